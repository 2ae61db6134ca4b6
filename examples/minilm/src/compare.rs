//! Compares this model with candle-transformers'.

use std::fmt;
use std::path::Path;
use std::time::Instant;

use anyhow::Result;
use candle_core::{Device, Tensor};
use minilm::model::{Model, Sentence};
use minilm::peer::{Peer, max_difference};
use serde_json::{Value, json};

/// How often each model runs. The median of its times is reported.
const ROUNDS: usize = 15;

pub struct Comparison {
    /// The largest difference of any entry of any token's state.
    pub max_difference: f32,
    pub milliseconds: f64,
    pub peer_milliseconds: f64,
}

/// Runs both models in turns, on all sentences as one batch.
pub fn compare(model: &Model, folder: &Path, sentences: &[Sentence], device: &Device) -> Result<Comparison> {
    let peer = Peer::open(folder, device)?;
    let (ids, lengths) = model.batch(&sentences.iter().collect::<Vec<_>>())?;
    let ours = || model.states_of(&ids, &lengths);
    let theirs = || peer.states(&ids, &lengths);
    let max_difference = max_difference(&ours()?, &theirs()?, &lengths)?;
    let mut times = [Vec::new(), Vec::new()];
    for _ in 0..ROUNDS {
        times[0].push(milliseconds(ours)?);
        times[1].push(milliseconds(theirs)?);
    }
    let [milliseconds, peer_milliseconds] = times.map(median);
    Ok(Comparison { max_difference, milliseconds, peer_milliseconds })
}

fn milliseconds(run: impl Fn() -> Result<Tensor>) -> Result<f64> {
    let start = Instant::now();
    // A GPU works on its own: it is done once a number has come back.
    run()?.flatten_all()?.get(0)?.to_scalar::<f32>()?;
    Ok(start.elapsed().as_secs_f64() * 1e3)
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

impl Comparison {
    pub fn to_json(&self) -> Value {
        json!({
            "max_difference": self.max_difference, "milliseconds": self.milliseconds,
            "peer_milliseconds": self.peer_milliseconds,
        })
    }
}

impl fmt::Display for Comparison {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let Self { max_difference, milliseconds, peer_milliseconds } = self;
        writeln!(f, "Token states differ from those of candle-transformers by at most {max_difference:.1e}.")?;
        let times = peer_milliseconds / milliseconds;
        write!(f, "{milliseconds:.1} ms, candle-transformers {peer_milliseconds:.1} ms: {times:.2} times as fast.")
    }
}
