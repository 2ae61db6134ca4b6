//! The parameters of a model that has attention layers.

use candle_core::{D, Result, Tensor, Var};

use crate::random::Random;

/// Draws the initial embeddings and linear layers from a seed, uniform in ±1 / sqrt(inputs). candle's own generator on the
/// CPU can't be seeded.
///
/// Parameters with `drawn` as a part of their name stay as they are: attention layers and blocks drew them from the seeds of their
/// configs. So do vectors: norms start at one.
pub fn initialise(parameters: &[(String, Var)], seed: u64, drawn: &str) -> Result<()> {
    let is_drawn = |name: &str| name.split('.').any(|part| part == drawn);
    for (name, var) in parameters.iter().filter(|(name, var)| var.rank() == 2 && !is_drawn(name)) {
        let mut random = Random::new(seed, name, 0);
        let bound = 1.0 / (var.dim(D::Minus1)? as f64).sqrt();
        let numbers: Vec<_> = (0..var.elem_count()).map(|_| ((random.unit() * 2.0 - 1.0) * bound) as f32).collect();
        var.set(&Tensor::from_vec(numbers, var.shape(), var.device())?.to_dtype(var.dtype())?)?;
    }
    Ok(())
}
