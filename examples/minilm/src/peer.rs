//! The same model from candle-transformers.

use std::fs;
use std::path::Path;

use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::bert::BertModel;

/// candle-transformers' BERT.
pub struct Peer(BertModel);

impl Peer {
    /// The model in a folder, as [`Model::open`](crate::model::Model::open).
    pub fn open(folder: &Path, device: &Device) -> Result<Self> {
        let config = serde_json::from_slice(&fs::read(folder.join("config.json"))?)?;
        let tensors = candle_core::safetensors::load(folder.join("model.safetensors"), device)?;
        Ok(Self(BertModel::load(VarBuilder::from_tensors(tensors, DType::F32, device), &config)?))
    }

    /// From token ids (batch, len), where sequence b has `lengths[b]` tokens, to states (batch, len, hidden_size).
    pub fn states(&self, ids: &Tensor, lengths: &[usize]) -> Result<Tensor> {
        let (batch, len) = ids.dims2()?;
        let mask = lengths.iter().flat_map(|&length| (0..len).map(move |i| u32::from(i < length)));
        let mask = Tensor::from_iter(mask, ids.device())?.reshape((batch, len))?;
        Ok(self.0.forward(ids, &ids.zeros_like()?, Some(&mask))?)
    }
}

/// The largest difference of two models' states, without those of the padding.
pub fn max_difference(a: &Tensor, b: &Tensor, lengths: &[usize]) -> Result<f32> {
    let mut largest = 0f32;
    for (i, &len) in lengths.iter().enumerate() {
        let tokens = |states: &Tensor| states.get(i)?.narrow(0, 0, len);
        largest = largest.max((tokens(a)? - tokens(b)?)?.abs()?.max_all()?.to_scalar::<f32>()?);
    }
    Ok(largest)
}
