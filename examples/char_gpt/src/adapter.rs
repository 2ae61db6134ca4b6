//! A second author on a base that was trained on a first one: LoRA on every linear layer of the blocks.

use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result};
use candle_attention::Layout;
use candle_attention::adapter::{LoraConfig, PeftExtras, Target, save_peft};
use candle_attention::train::{AdamW, named_variables};
use candle_core::Device;
use candle_nn::{VarBuilder, VarMap};

use crate::arguments::Arguments;
use crate::ranks::Ranks;
use crate::state::{ADAMW, Saved, State};
use crate::text::{Corpus, Vocabulary};

/// The rank and alpha of the adapter.
const RANK: usize = 8;
const ALPHA: f64 = 16.0;
/// The name of the adapter in the model.
const NAME: &str = "default";

/// A saved run with an adapter for another text. The text's characters that the base doesn't know are left out, and named.
pub fn start(
    arguments: &Arguments,
    base: &Path,
    (device, ranks): (&Device, &Ranks),
    screen: &mut impl Write,
) -> Result<(State, Corpus)> {
    let saved = Saved::read(base).with_context(|| format!("--base {}", base.display()))?;
    // The state that is trained doesn't hold the base's weights.
    ranks.agree("--base", &format!("a file with hash {:x}", saved.hash()))?;
    let text = arguments.text.as_deref().context("--adapter: expected the text that it learns from (--text)")?;
    let (corpus, unknown) = Corpus::with_vocabulary(text, Vocabulary::of(&saved.header.vocabulary))?;
    if !unknown.is_empty() {
        let (kinds, count): (String, usize) = (unknown.keys().collect(), unknown.values().sum());
        writeln!(screen, "{count} characters that the base doesn't know are left out: {kinds}")?;
    }
    let run = arguments.adapted_run(&saved.header.run)?;
    corpus.check_length(run.model.len)?;
    let state = saved.into_state(run, device).with_context(|| format!("--base {}", base.display()))?;
    Ok((adapt(state, device)?, corpus))
}

/// The same model with constants as parameters, and an adapter, which alone is trained.
fn adapt(base: State, device: &Device) -> Result<State> {
    let (run, varmap) = (base.run, VarMap::new());
    let vb = VarBuilder::from_varmap(&varmap, run.dtype.dtype(), device);
    let targets = vec![Target::Query, Target::Key, Target::Value, Target::Output, Target::Up, Target::Down];
    let config = LoraConfig { targets, seed: run.model.seed, ..LoraConfig::new(RANK.min(run.model.width), ALPHA) };
    let model = base.model.with_lora(NAME, &config, vb)?;
    let optimizer = AdamW::new(&named_variables(&varmap), ADAMW)?.with_master_weights()?;
    Ok(State { run, model, optimizer })
}

/// Saves the adapter as PEFT does, with this crate's names of the layers.
pub fn save(state: &State, base: &Path, folder: &Path) -> Result<()> {
    let names: Vec<_> = (0..state.run.model.layers).map(|layer| format!("blocks.{layer}")).collect();
    let layers: Vec<_> = names.iter().map(String::as_str).zip(state.model.blocks()).collect();
    let extras = PeftExtras { base_model_name_or_path: Some(base.display().to_string()), ..Default::default() };
    save_peft(folder, NAME, Layout::Own, &layers, &extras).context("can't save the adapter")
}
