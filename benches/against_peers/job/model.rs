//! Whole models.

use std::path::Path;

use candle_core::{DType, Error, Result};
use minilm::model::Model;
use minilm::peer::Peer;

use super::{Contender, Forward, Inputs};

/// The states of the last layer, for sentences of equal length. candle's model is that of candle-transformers.
pub fn minilm(inputs: &Inputs, folder: &Path) -> Result<Forward> {
    let ids = inputs.get("ids")?.to_dtype(DType::U32)?;
    let (batch, len) = ids.dims2()?;
    let lengths = vec![len; batch];
    let model = Model::open(folder, ids.device()).map_err(|error| Error::msg(format!("{error:#}")))?;
    let peer = Peer::open(folder, ids.device()).map_err(|error| Error::msg(format!("{error:#}")))?;
    Ok(Box::new(move |contender| {
        let states = match contender {
            Contender::Ours | Contender::OursFused => model.states_of(&ids, &lengths),
            Contender::Candle | Contender::CandleFlash => peer.states(&ids, &lengths),
        };
        states.map_err(|error| Error::msg(format!("{error:#}")))
    }))
}
