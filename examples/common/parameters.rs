//! The parameters of a model around attention layers.

use candle_core::{D, Result, Tensor, Var};
use candle_nn::VarMap;

use crate::random::Random;

/// All parameters with their names, in the same order every time.
pub fn named_vars(varmap: &VarMap) -> Vec<(String, Var)> {
    let vars = varmap.data().lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let mut vars: Vec<_> = vars.iter().map(|(name, var)| (name.clone(), var.clone())).collect();
    vars.sort_by(|(a, _), (b, _)| a.cmp(b));
    vars
}

/// Makes the initial parameters the same for the same seed, which candle's CPU generator doesn't allow. The attention
/// layers, which are called so, have seen to it themselves (`SelfAttentionConfig::seed`), and norms start at one anyway; what
/// is left are embeddings and linear layers, here uniform in ±1 / sqrt(inputs).
pub fn initialise(varmap: &VarMap, seed: u64, attention: &str) -> Result<()> {
    let is_ours = |name: &str| !name.split('.').any(|part| part == attention);
    for (name, var) in named_vars(varmap).into_iter().filter(|(name, var)| var.rank() == 2 && is_ours(name)) {
        let mut random = Random::new(seed, &name, 0);
        let bound = 1.0 / (var.dim(D::Minus1)? as f64).sqrt();
        let numbers: Vec<_> = (0..var.elem_count()).map(|_| ((random.unit() * 2.0 - 1.0) * bound) as f32).collect();
        var.set(&Tensor::from_vec(numbers, var.shape(), var.device())?)?;
    }
    Ok(())
}
