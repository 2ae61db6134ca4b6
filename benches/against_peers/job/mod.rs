//! The computations that are timed.

mod attention;
mod block;
mod model;
mod operation;
mod optimizer;

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_attention::train::backward;
use candle_core::backend::{BackendDevice, BackendStorage};
use candle_core::backprop::GradStore;
use candle_core::{CpuStorage, CudaStorage, CustomOp1, DType, Device, Layout, Result, Shape, Tensor, Var};
use candle_nn::VarBuilder;
use serde::Deserialize;

use operation::Operation;
use optimizer::Steps;

#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Contender {
    /// candle-attention.
    Ours,
    /// candle-attention's fused path. An error where it can't serve.
    OursFused,
    /// Plain candle: for attention matmul, softmax, matmul.
    Candle,
    /// candle's fused attention, which has no gradient.
    CandleFlash,
}

impl Contender {
    /// The backward pass of a contender: this crate has its own.
    fn backward(self, output: &Tensor) -> Result<GradStore> {
        match self {
            Self::Ours | Self::OursFused => Ok(backward(output)?),
            Self::Candle | Self::CandleFlash => output.backward(),
        }
    }
}

/// What a job computes from the tensors in its file.
#[derive(Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Description {
    /// Attention over `query`, `key` and `value`, with `bias` or `key_mask` (batch, kv_len) if they are there.
    Attention { causal: bool, backward: bool },
    /// Self-attention with its projections over `x`. The other tensors are its parameters.
    Layer { num_heads: usize, backward: bool },
    /// One operation, with the gradients of these tensors.
    Operation { name: Operation, trained: Vec<String> },
    /// Steps of AdamW for parameters whose gradients are called `grad_` and their name.
    Adamw { lr: f64 },
    /// Transformer blocks over `x`. The other tensors are their parameters.
    Blocks(block::Description),
    /// all-MiniLM-L6-v2 from a folder, over token `ids` (batch, len).
    Minilm { folder: PathBuf },
}

/// A loss with a given gradient, as in PyTorch's `output.backward(gradient)`.
struct GradOutput(Tensor);

impl CustomOp1 for GradOutput {
    fn name(&self) -> &'static str {
        "grad-output"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok((CpuStorage::F32(vec![0.0]), Shape::from(())))
    }

    fn cuda_fwd(&self, storage: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        Ok((storage.device().zeros_impl(&Shape::from(()), DType::F32)?, Shape::from(())))
    }

    fn bwd(&self, output: &Tensor, _: &Tensor, _: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(self.0.broadcast_as(output.shape())?))
    }
}

/// The variables that get a gradient, with their names.
type Trained = Vec<(String, Var)>;

/// Computes the output.
type Forward = Box<dyn Fn(Contender) -> Result<Tensor>>;

/// The tensors of a job's file, by name.
struct Inputs(HashMap<String, Tensor>);

impl Inputs {
    fn get(&self, name: &str) -> Result<&Tensor> {
        self.0.get(name).ok_or_else(|| candle_core::Error::msg(format!("expected a tensor `{name}`")))
    }

    fn take(&mut self, name: &str) -> Result<Tensor> {
        self.get(name)?;
        Ok(self.0.remove(name).expect("a tensor that was there"))
    }

    /// Turns these tensors into variables.
    fn train<S: AsRef<str>>(&mut self, names: &[S]) -> Result<Trained> {
        let mut trained = Vec::new();
        for name in names.iter().map(S::as_ref) {
            let var = Var::from_tensor(&self.take(name)?)?;
            self.0.insert(name.to_string(), var.as_tensor().clone());
            trained.push((name.to_string(), var));
        }
        Ok(trained)
    }

    /// A builder that gives all tensors as parameters: variables if there is a backward pass.
    fn parameters(self, backward: bool, device: &Device) -> Result<(VarBuilder<'static>, Trained)> {
        self.parameters_of(backward, |_| true, device)
    }

    /// The same with variables of some names alone.
    fn parameters_of(
        mut self,
        backward: bool,
        is_trained: impl Fn(&str) -> bool,
        device: &Device,
    ) -> Result<(VarBuilder<'static>, Trained)> {
        let names = self.0.keys().filter(|name| backward && is_trained(name)).cloned();
        let names: Vec<String> = names.collect();
        let trained = self.train(&names)?;
        let dtype = self.0.values().next().map_or(DType::F32, Tensor::dtype);
        Ok((VarBuilder::from_tensors(self.0, dtype, device), trained))
    }
}

enum Work {
    /// An output and, given its gradient, those of the variables.
    Output {
        forward: Forward,
        trained: Trained,
        grad_output: Option<Tensor>,
    },
    Steps(Box<Steps>),
}

pub struct Job {
    work: Work,
    device: Device,
}

impl Job {
    pub fn load(path: &Path, description: Description, device: Device) -> Result<Self> {
        let mut inputs = Inputs(candle_core::safetensors::load(path, &device)?);
        let grad_output = inputs.0.remove("grad_output");
        let (forward, trained) = match description {
            Description::Attention { causal, backward } => attention::attention(inputs, causal, backward)?,
            Description::Layer { num_heads, backward } => attention::layer(inputs, num_heads, backward)?,
            Description::Operation { name, trained } => operation::operation(inputs, name, &trained)?,
            Description::Adamw { lr } => {
                let work = Work::Steps(Box::new(Steps::new(&inputs, lr)?));
                return Ok(Self { work, device });
            }
            Description::Blocks(description) => block::blocks(inputs, description)?,
            Description::Minilm { folder } => (model::minilm(&inputs, &folder)?, Vec::new()),
        };
        Ok(Self { work: Work::Output { forward, trained, grad_output }, device })
    }

    pub fn device(&self) -> &Device {
        &self.device
    }

    /// A run as it is timed. The gradient of the output is 1, with which candle itself starts: a given one would cost an addition
    /// of the size of the output.
    pub fn run(&self, contender: Contender) -> Result<()> {
        match &self.work {
            Work::Output { forward, trained, .. } if trained.is_empty() => forward(contender).map(drop),
            Work::Output { forward, .. } => contender.backward(&forward(contender)?).map(drop),
            Work::Steps(steps) => steps.step(contender),
        }
    }

    /// The output, and the gradients of the variables if there are any; or all parameters after the next step.
    pub fn answer(&self, contender: Contender) -> Result<Vec<(String, Tensor)>> {
        let (forward, trained, grad_output) = match &self.work {
            Work::Output { forward, trained, grad_output } => (forward, trained, grad_output),
            Work::Steps(steps) => return steps.answer(contender),
        };
        let output = forward(contender)?;
        let mut all = Vec::new();
        if !trained.is_empty() {
            let Some(grad) = grad_output else { candle_core::bail!("expected a tensor `grad_output`") };
            let grads = contender.backward(&output.apply_op1(GradOutput(grad.clone()))?)?;
            for (name, var) in trained {
                let grad = grads.get(var).ok_or_else(|| candle_core::Error::msg(format!("no gradient of `{name}`")))?;
                all.push((format!("grad_{name}"), grad.clone()));
            }
        }
        all.push(("output".to_string(), output.detach()));
        Ok(all)
    }
}
