//! A run as a file, with everything that is needed to continue it as if it had never stopped.
//!
//! The file is safetensors. Its tensors are the parameters under `model.` and AdamW's state under `optimizer.`; the metadata entry `char_gpt` says in JSON what run they belong to. Batches and dropout are functions of
//! seed and step, so no generator has a state to save.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use attention_examples::parameters::initialise;
use candle_attention::train::{AdamW, AdamWConfig, named_variables};
use candle_core::safetensors::Load;
use candle_core::{DType, Device, Tensor};
use candle_nn::{VarBuilder, VarMap};
use clap::ValueEnum;
use safetensors::SafeTensors;
use serde::{Deserialize, Serialize};

use crate::model::{Gpt, ModelConfig};
use crate::text::{Corpus, TextId, fnv};

/// The metadata entry that holds the [`Header`].
const METADATA_KEY: &str = "char_gpt";
/// What the names of the parameters begin with, and those of AdamW's state.
const MODEL: &str = "model.";
const OPTIMIZER: &str = "optimizer.";
/// The attention and the MLP of each block draw their own initial parameters.
const BLOCKS: &str = "blocks";
/// As in nanoGPT; the learning rate follows a schedule.
pub const ADAMW: AdamWConfig = AdamWConfig { lr: 0.0, beta1: 0.9, beta2: 0.99, eps: 1e-8, weight_decay: 0.1 };

/// The type of a model's numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum Numbers {
    #[default]
    F32,
    /// The optimiser keeps a copy of the parameters in f32
    Bf16,
}

impl Numbers {
    pub fn dtype(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::Bf16 => DType::BF16,
        }
    }
}

/// What defines a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunConfig {
    pub model: ModelConfig,
    pub batch: usize,
    pub lr: f64,
    pub steps: usize,
    /// Older files have none.
    #[serde(default)]
    pub dtype: Numbers,
}

/// The JSON in the metadata of a file.
#[derive(Serialize, Deserialize)]
pub struct Header {
    pub run: RunConfig,
    /// The number of steps taken.
    pub step: usize,
    pub text: TextId,
    /// The model's characters, by token.
    pub vocabulary: String,
}

/// A model in training.
pub struct State {
    pub run: RunConfig,
    pub model: Gpt,
    pub optimizer: AdamW,
}

impl State {
    pub fn new(run: RunConfig, device: &Device) -> Result<Self> {
        let varmap = VarMap::new();
        let model = Gpt::new(&run.model, VarBuilder::from_varmap(&varmap, run.dtype.dtype(), device))?;
        let parameters = named_variables(&varmap);
        initialise(&parameters, run.model.seed, BLOCKS)?;
        // A step of a parameter in bf16 is often smaller than what bf16 can tell apart.
        let optimizer = AdamW::new(&parameters, ADAMW)?.with_master_weights()?;
        Ok(Self { model, optimizer, run })
    }

    /// The number of steps taken.
    pub fn step(&self) -> usize {
        self.optimizer.steps()
    }

    pub fn parameter_count(&self) -> usize {
        self.optimizer.parameters().map(|(_, var)| var.elem_count()).sum()
    }

    /// Saves the run. The file is replaced as a whole or not at all, even if this process is killed.
    pub fn save(&self, file: &Path, corpus: &Corpus) -> Result<()> {
        let bytes = self.to_bytes(corpus)?;
        replace(file, &bytes).with_context(|| format!("{}: can't write the run", file.display()))
    }

    /// What [`State::save`] writes.
    pub fn to_bytes(&self, corpus: &Corpus) -> Result<Vec<u8>> {
        let header = Header {
            run: self.run.clone(),
            step: self.step(),
            text: corpus.id.clone(),
            vocabulary: corpus.vocabulary.characters(),
        };
        let metadata = HashMap::from([(METADATA_KEY.to_string(), serde_json::to_string(&header)?)]);
        let parameters =
            self.optimizer.parameters().map(|(name, var)| (format!("{MODEL}{name}"), var.as_tensor().clone()));
        let moments = self.optimizer.state()?.into_iter().map(|(name, tensor)| (format!("{OPTIMIZER}{name}"), tensor));
        let on_cpu = |(name, tensor): (String, Tensor)| Ok((name, tensor.to_device(&Device::Cpu)?));
        let tensors = parameters.chain(moments).map(on_cpu).collect::<candle_core::Result<BTreeMap<_, _>>>()?;
        Ok(safetensors::serialize(tensors, Some(metadata))?)
    }
}

/// A file that has been read, but isn't a [`State`] yet.
pub struct Saved {
    pub header: Header,
    bytes: Vec<u8>,
}

impl Saved {
    pub fn read(file: &Path) -> Result<Self> {
        let bytes = fs::read(file).context("can't read the saved run")?;
        let (_, metadata) = SafeTensors::read_metadata(&bytes)
            .with_context(|| format!("expected a saved run, got {} bytes that aren't safetensors", bytes.len()))?;
        let entry = metadata.metadata().as_ref().and_then(|entries| entries.get(METADATA_KEY));
        let json = entry.context("expected a saved run, got safetensors of another kind")?;
        let header = serde_json::from_str(json).context("expected a saved run, got one of another version")?;
        // Checks also that the file is as long as it says.
        SafeTensors::deserialize(&bytes).context("expected a whole file, got a part of one")?;
        Ok(Self { header, bytes })
    }

    /// Of the whole file.
    pub fn hash(&self) -> u64 {
        fnv(&self.bytes)
    }

    pub fn check_text(&self, corpus: &Corpus) -> Result<()> {
        let (expected, got) = (&self.header.text, &corpus.id);
        let same = expected == got && self.header.vocabulary == corpus.vocabulary.characters();
        ensure!(
            same,
            "the run learns from another text: expected one of {} characters with hash {:x}, got {} with {:x} (--text)",
            expected.characters,
            expected.hash,
            got.characters,
            got.hash
        );
        Ok(())
    }

    /// The saved run, to be continued as `run` says.
    pub fn into_state(self, run: RunConfig, device: &Device) -> Result<State> {
        let tensors = SafeTensors::deserialize(&self.bytes)?;
        let mut state = State::new(run, device)?;
        let mut moments = HashMap::new();
        let mut parameters = HashMap::new();
        for (name, tensor) in tensors.iter() {
            match (name.strip_prefix(MODEL), name.strip_prefix(OPTIMIZER)) {
                (Some(name), _) => parameters.insert(name.to_string(), tensor.load(device)?),
                (_, Some(name)) => moments.insert(name.to_string(), tensor.load(device)?),
                _ => bail!("expected parameters and moments, got a tensor {name}"),
            };
        }
        state.optimizer.set_state(&moments, self.header.step)?;
        for (name, var) in state.optimizer.parameters() {
            let saved = parameters.remove(name).with_context(|| format!("expected a tensor {MODEL}{name}"))?;
            ensure!(
                saved.dims() == var.dims(),
                "{MODEL}{name}: expected shape {:?}, got {:?}",
                var.dims(),
                saved.dims()
            );
            let (expected, got) = (var.dtype(), saved.dtype());
            ensure!(got == expected, "{MODEL}{name}: expected dtype {expected:?}, got {got:?}");
            var.set(&saved)?;
        }
        ensure!(parameters.is_empty(), "expected no other tensors than the model's, got {:?}", parameters.keys());
        Ok(state)
    }
}

/// Writes a file with the suffix `.part` in the same folder, and renames it to `file`.
///
/// `attention_files::write` would not do: it chooses a random name for its temporary file, so that each of many killed runs
/// could leave a file behind. Here the next save replaces what a killed one left.
fn replace(file: &Path, bytes: &[u8]) -> std::io::Result<()> {
    // A link stays a link.
    let file = fs::canonicalize(file).unwrap_or_else(|_| file.to_path_buf());
    if file.is_dir() {
        return Err(std::io::ErrorKind::IsADirectory.into());
    }
    let mut name = file.file_name().unwrap_or_default().to_os_string();
    name.push(".part");
    let part = file.with_file_name(name);
    let mut written = File::create(&part)?;
    let done = written.write_all(bytes).and_then(|()| written.sync_all()).and_then(|()| fs::rename(&part, &file));
    if done.is_err() {
        // For example the disk is full. What was written is useless, and the first error says why.
        let _ = fs::remove_file(&part);
    }
    done?;
    // A rename is on disk only after the folder has been synced. Only Unix can sync a folder.
    #[cfg(unix)]
    File::open(folder_of(&file))?.sync_all()?;
    Ok(())
}

#[cfg(unix)]
fn folder_of(file: &Path) -> PathBuf {
    match file.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder.to_path_buf(),
        _ => PathBuf::from("."),
    }
}
