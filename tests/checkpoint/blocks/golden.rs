//! Blocks of Hugging Face transformers, loaded from weights with their original names: output, every gradient, and the saved
//! tensors. tests/golden/make_blocks.py says where the numbers come from.

use candle_attention::block::{
    Activation, MlpConfig, NormConfig, NormPlacement, TransformerBlock, TransformerBlockConfig,
};
use candle_attention::{Backend, ForwardOptions, Layout, Mask};
use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::VarBuilder;

use crate::common::{assert_same_bits, gradients, max_scaled_difference, randn};
use crate::transformers::decoders::{ModelFile, layer_config};

/// The layout and the config of the block `name`.
fn block_config(file: &ModelFile, name: &str) -> (Layout, TransformerBlockConfig) {
    let attention = match file.kind() {
        "bert" => "attention",
        "gpt2" => "attn",
        _ => "self_attn",
    };
    let (layout, attention) = layer_config(file, &format!("{name}.{attention}"));
    let dim = attention.embed_dim;
    let swiglu = || MlpConfig::swiglu(dim, file.size("intermediate_size"));
    let rms = || NormConfig::rms(file.number("rms_norm_eps"));
    let (mlp, norm, placement) = match file.kind() {
        "bert" => {
            let mlp = MlpConfig::new(dim, file.size("intermediate_size"));
            (mlp, NormConfig::layer(file.number("layer_norm_eps")), NormPlacement::Post)
        }
        "gpt2" => {
            let mlp = MlpConfig { activation: Activation::GeluTanh, ..MlpConfig::new(dim, file.size("n_inner")) };
            (mlp, NormConfig::layer(file.number("layer_norm_epsilon")), NormPlacement::Pre)
        }
        "gemma2" => {
            let mlp = MlpConfig { activation: Activation::GeluTanh, ..swiglu() };
            (mlp, NormConfig { unit_offset: true, ..rms() }, NormPlacement::Sandwich)
        }
        _ => (swiglu(), rms(), NormPlacement::Pre),
    };
    (layout, TransformerBlockConfig { placement, ..TransformerBlockConfig::new(attention, mlp, norm) })
}

/// A block of a file.
struct Case<'a> {
    file: &'a ModelFile,
    name: &'a str,
    layout: Layout,
    config: TransformerBlockConfig,
}

impl<'a> Case<'a> {
    fn new(file: &'a ModelFile, name: &'a str) -> Self {
        let (layout, config) = block_config(file, name);
        Self { file, name, layout, config }
    }

    fn golden(&self, part: &str) -> &Tensor {
        self.file.expect(&format!("golden.{}.{part}", self.name))
    }

    /// A block of the tensors under this prefix.
    fn block(&self, prefix: &str, dtype: DType) -> Result<TransformerBlock> {
        let vb = VarBuilder::from_tensors(self.file.tensors.clone(), dtype, &Device::Cpu);
        Ok(TransformerBlock::from_layout(self.layout, &self.config, vb.pp(prefix))?)
    }

    /// The output of a block and the gradients of the input and of every parameter.
    fn run(&self, block: &TransformerBlock, x: &Tensor, backend: Backend) -> Result<Vec<Tensor>> {
        let x = Var::from_tensor(x)?;
        let attn_mask = match self.file.get("golden.attention_mask") {
            Some(mask) => Mask::from_tensor(&mask.unsqueeze(1)?.unsqueeze(1)?)?,
            None => Mask::full(),
        };
        let options = ForwardOptions { attn_mask, backend, ..Default::default() };
        let output = block.forward_with(&x, &options)?.output;
        let loss = (&output * self.golden("cotangent").to_dtype(x.dtype())?)?;
        let vars = block.vars();
        let gradients = gradients(&loss, &[&x].into_iter().chain(&vars).collect::<Vec<_>>())?;
        Ok([vec![output], gradients].concat())
    }

    /// The golden output and gradients, with their names, in the order of `run`.
    fn expected(&self) -> Result<Vec<(String, Tensor)>> {
        // The gradients have the names and the form of the parameters, so the layout reads them, too.
        let block = self.block(&format!("golden.{}.grad", self.name), DType::F64)?;
        let gradients = block.parameters().into_iter().map(|(name, tensor)| (name, tensor.clone()));
        let first = [("output", "output"), ("gradient of the input", "grad_input")];
        let first = first.map(|(name, part)| (name.to_string(), self.golden(part).clone()));
        Ok(first.into_iter().chain(gradients).collect())
    }

    /// What a change of the input and of every parameter by about half a unit in the last place of f32 changes, of each result.
    fn rounding(&self) -> Result<Vec<f64>> {
        let changed = |seed, x: &Tensor| {
            let factors = randn(seed, x.shape(), DType::F64)?.affine(2f64.powi(-24), 1.0)?;
            x.to_dtype(DType::F64)? * factors
        };
        let block = self.block(self.name, DType::F64)?.trainable()?;
        for (var, seed) in block.vars().iter().zip(2..) {
            var.set(&changed(seed, var)?.detach())?;
        }
        let found = self.run(&block, &changed(1, self.golden("input"))?, Backend::Auto)?;
        let pairs = found.iter().zip(self.expected()?);
        pairs.map(|(found, (_, golden))| max_scaled_difference(found, &golden)).collect()
    }

    /// Checks output and gradients in this dtype, each with a bound of its own.
    fn check(&self, dtype: DType, backend: Backend, bounds: &[f64]) -> Result<f64> {
        let block = self.block(self.name, dtype)?.trainable()?;
        let found = self.run(&block, &self.golden("input").to_dtype(dtype)?, backend)?;
        let (expected, mut worst) = (self.expected()?, 0f64);
        assert_eq!((found.len(), bounds.len()), (expected.len(), expected.len()));
        for ((found, (name, golden)), bound) in found.iter().zip(&expected).zip(bounds) {
            let difference = max_scaled_difference(found, golden)?;
            let what = format!("{}, {}, {dtype:?}, {backend:?}, {name}", self.file.kind(), self.name);
            assert!(difference < *bound, "{what}: differs by {difference:e}, at most {bound:e} expected");
            worst = worst.max(difference);
        }
        Ok(worst)
    }

    /// Checks that the block is saved with the tensors from which it was loaded.
    fn check_saved_tensors(&self) -> Result<()> {
        let saved = self.block(self.name, DType::F64)?.to_layout(self.layout)?;
        let prefix = format!("{}.", self.name);
        let all = self.file.tensors.keys().filter(|name| name.starts_with(&prefix)).count();
        assert_eq!(saved.len(), all, "saved tensors of {}", self.name);
        for (name, tensor) in saved {
            let name = format!("{prefix}{name}");
            assert_same_bits(&tensor, self.file.expect(&name), &name);
        }
        Ok(())
    }
}

/// The bound in f32, of what a change of every input and parameter by about half a unit in the last place of f32 changes. These blocks have
/// large weights, which turn it into up to 4e-5 of a gradient. Up to 4 times as much was seen.
const TIMES_ROUNDING: f64 = 6.0;
/// For sums that such a change leaves at zero, such as the gradient of the keys' bias: their terms cancel but for their own rounding.
const CANCELLED: f64 = 1e-5;

/// Checks every block in the file of this kind of model. There must be `count` blocks.
fn check(kind: &str, count: usize) -> anyhow::Result<()> {
    let file = ModelFile::load(&format!("blocks/{kind}"))?;
    assert_eq!(file.layers.len(), count, "blocks in the file of {kind}");
    for dtype in [DType::F64, DType::F32] {
        let mut worst: f64 = 0.0;
        for name in &file.layers {
            let case = Case::new(&file, name);
            let bound = |rounding: f64| if dtype == DType::F64 { 1e-12 } else { TIMES_ROUNDING * rounding + CANCELLED };
            let bounds: Vec<f64> = case.rounding()?.into_iter().map(bound).collect();
            for backend in [Backend::Auto, Backend::Reference] {
                worst = worst.max(case.check(dtype, backend, &bounds)?);
            }
        }
        println!("{kind}, {dtype:?}: largest difference {worst:e}");
    }
    for name in &file.layers {
        Case::new(&file, name).check_saved_tensors()?;
    }
    Ok(())
}

macro_rules! agrees_with_transformers {
    ($($kind:ident: $count:literal,)*) => {
        mod agrees_with_transformers {
            $(
                #[test]
                fn $kind() -> anyhow::Result<()> {
                    super::check(stringify!($kind), $count)
                }
            )*
        }
    };
}

agrees_with_transformers! {
    bert: 1,
    gemma2: 2,
    gpt2: 1,
    llama: 1,
    phi3: 1,
    qwen3: 1,
}
