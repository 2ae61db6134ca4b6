//! [`Module`]: the linear layers of a checkpoint, for adapters.

use candle_core::Tensor;

use crate::checkpoint::Parameters;
use crate::checkpoint::layout::plan::{Form, Piece, Plan};
use crate::checkpoint::layout::transfer::{join, split};
use crate::error::Result;
use crate::layer::config::Parameter;

/// A linear layer of the checkpoint, whose weight holds the rows of one or several projections: `c_attn` of GPT-2 those of q_proj,
/// k_proj and v_proj.
pub(crate) struct Module {
    /// Its name in the checkpoint.
    pub(crate) name: String,
    pub(crate) inputs: usize,
    /// The weight, with the projections as its parts. A matrix of an adapter has the same rows of another length.
    rows: Piece,
}

impl Module {
    /// The names of the projections, in the order of their rows.
    pub(crate) fn projections(&self) -> impl Iterator<Item = &str> {
        self.rows.parts.iter().map(|part| &*part.name)
    }

    /// The rows of all projections.
    pub(crate) fn outputs(&self) -> usize {
        self.rows.parts.iter().map(|part| part.shape[0]).sum()
    }

    /// Splits a matrix (out, rank) into one for each projection. Those of a variable are new variables.
    pub(crate) fn split(&self, matrix: &Tensor) -> Result<Parameters> {
        split(&self.rows, matrix)
    }

    /// Joins one matrix (out, rank) for each projection.
    pub(crate) fn join(&self, parts: &[Tensor]) -> Result<Tensor> {
        let rank = parts.first().map_or(Ok(0), |part| part.dim(1))?;
        let sized = |part: &Parameter| Parameter { shape: vec![part.shape[0], rank], ..part.clone() };
        join(&self.rows.with_parts(self.rows.parts.iter().map(sized).collect()), parts)
    }
}

impl Plan {
    /// Every linear layer.
    pub(crate) fn modules(&self) -> Vec<Module> {
        self.pieces.iter().filter_map(Module::of).collect()
    }
}

impl Module {
    /// The linear layer whose weight this is, if it is one.
    fn of(weight: &Piece) -> Option<Self> {
        let name = weight.name.strip_suffix(".weight")?.to_string();
        let part = |part: &Parameter| {
            let projection = part.name.strip_suffix(".weight")?.to_string();
            (part.shape.len() == 2).then(|| Parameter { name: projection.into(), ..part.clone() })
        };
        let parts = weight.parts.iter().map(part).collect::<Option<Vec<_>>>()?;
        let inputs = parts.first()?.shape[1];
        let form = if weight.form == Form::ByKeyHeads { Form::ByKeyHeads } else { Form::Plain };
        let mut rows = weight.with_parts(parts);
        rows.form = form;
        Some(Self { name, inputs, rows })
    }
}
