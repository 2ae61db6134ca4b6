//! [`Weights`]: the tensors of a checkpoint on disk, in one file or in shards.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path, PathBuf};

use attention_files::{FileError, read};
use candle_core::{DType, Device, Result as CandleResult, Shape, Tensor};
use candle_nn::VarBuilder;
use candle_nn::var_builder::SimpleBackend;
use safetensors::tensor::TensorInfo;
use serde::Deserialize;

use crate::checkpoint::parameter::ASK_FOR_STORED;
use crate::checkpoint::tensors::TensorFile;
use crate::error::{AttentionError, Result};
use crate::unique_map::UniqueMap;

/// A `VarBuilder` for a whole model from a checkpoint on disk: a safetensors file, the `*.index.json` of a sharded one,
/// or a folder with either.
///
/// Each tensor is read when the `VarBuilder` is asked for it, without a memory map, and cast to `dtype`.
///
/// # Errors
///
/// A file that can't be read or isn't safetensors; a folder with no checkpoint or several; an index that can't be
/// parsed, or that names a shard outside its folder, a missing shard, or a tensor that isn't in its shard.
///
/// # Examples
///
/// ```
/// use candle_attention::{Layout, SelfAttention, SelfAttentionConfig, checkpoint};
/// use candle_core::{DType, Device};
/// use candle_nn::{VarBuilder, VarMap};
///
/// # let folder = tempfile::tempdir()?;
/// # let path = folder.path().join("model.safetensors");
/// # let config = SelfAttentionConfig::new(8, 2);
/// # let made = SelfAttention::new(&config, VarBuilder::from_varmap(&VarMap::new(), DType::F32, &Device::Cpu))?;
/// # made.save_layout(Layout::Bert, "encoder.layer.0.attention", &path)?;
/// let vb = checkpoint::var_builder(&path, DType::F32, &Device::Cpu)?.pp("encoder.layer.0.attention");
/// let attention = SelfAttention::from_layout(Layout::Bert, &config, vb)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn var_builder(path: impl AsRef<Path>, dtype: DType, device: &Device) -> Result<VarBuilder<'static>> {
    Ok(VarBuilder::from_backend(Box::new(Weights::open(path.as_ref())?), dtype, device.clone()))
}

/// The tensors of a checkpoint, none of which has been read yet.
pub(super) struct Weights {
    files: Vec<TensorFile>,
    /// For each tensor, the index of the file that holds it.
    file_of: BTreeMap<String, usize>,
}

impl Weights {
    pub(super) fn open(path: &Path) -> Result<Self> {
        let path = if path.is_dir() { find_in_folder(path)? } else { path.to_path_buf() };
        if path.extension().is_some_and(|extension| extension == "json") {
            return Self::from_index(&path);
        }
        let file = TensorFile::open(&path)?;
        let file_of = file.names().into_iter().map(|name| (name, 0)).collect();
        Ok(Self { files: vec![file], file_of })
    }

    /// From the index of a sharded checkpoint, as Hugging Face writes it.
    fn from_index(path: &Path) -> Result<Self> {
        let shards = read_index(path)?;
        let folder = path.parent().unwrap_or(Path::new(""));
        let names: Vec<&str> = shards.values().map(String::as_str).collect::<BTreeSet<_>>().into_iter().collect();
        let files = names.iter().map(|name| TensorFile::open(&folder.join(name))).collect::<Result<Vec<_>>>()?;
        let mut file_of = BTreeMap::new();
        let mut problems = Vec::new();
        for (tensor, shard) in &shards {
            match names.iter().position(|name| name == shard) {
                Some(index) if files[index].info(tensor).is_some() => {
                    file_of.insert(tensor.clone(), index);
                }
                _ => problems.push(format!("`{tensor}` isn't in `{shard}`, which the index names for it")),
            }
        }
        if problems.is_empty() {
            return Ok(Self { files, file_of });
        }
        Err(AttentionError::CheckpointTensors { path: Some(path.to_path_buf()), problems }.into())
    }

    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.file_of.keys().map(String::as_str)
    }

    pub(super) fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.files[*self.file_of.get(name)?].info(name)
    }

    /// Reads a tensor to the CPU, in its dtype on disk.
    pub(super) fn read(&self, name: &str) -> Result<Tensor> {
        match self.file_of.get(name) {
            Some(&index) => self.files[index].read(name),
            None => Err(candle_core::Error::CannotFindTensor { path: name.to_string() }.bt().into()),
        }
    }
}

impl SimpleBackend for Weights {
    fn get(&self, shape: Shape, name: &str, _: candle_nn::Init, dtype: DType, device: &Device) -> CandleResult<Tensor> {
        let tensor = self.get_unchecked(name, dtype, device)?;
        if tensor.shape() == &shape {
            return Ok(tensor);
        }
        let (msg, got) = (format!("`{name}` of the checkpoint"), tensor.shape().clone());
        Err(candle_core::Error::UnexpectedShape { msg, expected: shape, got }.bt())
    }

    fn get_unchecked(&self, name: &str, dtype: DType, device: &Device) -> CandleResult<Tensor> {
        if dtype == ASK_FOR_STORED
            && let Some(got) = self.info(name).and_then(|info| DType::try_from(info.dtype).ok())
        {
            return Err(AttentionError::DType { tensor: "tensor of a checkpoint", expected: "F4".into(), got }.into());
        }
        self.read(name)?.to_dtype(dtype)?.to_device(device)
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.file_of.contains_key(name)
    }
}

/// Finds the checkpoint in a folder: the one that Hugging Face's programs would take, otherwise the only one.
fn find_in_folder(folder: &Path) -> Result<PathBuf> {
    let io_error = |cause: std::io::Error| FileError::read(folder, &cause);
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(io_error)? {
        files.push(entry.map_err(io_error)?.file_name().to_string_lossy().into_owned());
    }
    for name in ["model.safetensors", "model.safetensors.index.json"] {
        if files.iter().any(|file| file == name) {
            return Ok(folder.join(name));
        }
    }
    files.sort();
    let ending = |end: &str| files.iter().filter(|file| file.ends_with(end)).map(String::as_str).collect::<Vec<_>>();
    match (&ending(".safetensors.index.json")[..], &ending(".safetensors")[..]) {
        ([index], _) => Ok(folder.join(index)),
        ([], [file]) => Ok(folder.join(file)),
        (indices, files) => {
            let expected = "one safetensors file, or the index of a sharded one".into();
            let found = [indices, files].concat();
            let got = if found.is_empty() { "neither".to_string() } else { found.join(", ") };
            Err(AttentionError::Checkpoint { path: Some(folder.to_path_buf()), expected, got }.into())
        }
    }
}

/// The shard of each tensor, by name. Checks that all shards exist and are inside the folder of the index.
fn read_index(path: &Path) -> Result<BTreeMap<String, String>, AttentionError> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: UniqueMap<String>,
    }
    let bytes = read(path)?;
    let index: Index = serde_json::from_slice(&bytes).map_err(|error| AttentionError::Checkpoint {
        path: Some(path.to_path_buf()),
        expected: "the index of a sharded checkpoint, with a `weight_map` from tensors to files".into(),
        got: format!("{} bytes that aren't one: {error}", bytes.len()),
    })?;
    let weight_map = index.weight_map.into_map();
    let shards: BTreeSet<&String> = weight_map.values().collect();
    let list = |shards: Vec<&&String>| shards.iter().map(|shard| format!("`{shard}`")).collect::<Vec<_>>().join(", ");
    let is_inside = |shard: &str| {
        let mut parts = Path::new(shard).components().peekable();
        parts.peek().is_some() && parts.all(|part| matches!(part, Component::Normal(_)))
    };
    let outside: Vec<_> = shards.iter().filter(|shard| !is_inside(shard)).collect();
    if !outside.is_empty() {
        let expected = "shards inside the folder of the index".into();
        return Err(AttentionError::Checkpoint { path: Some(path.to_path_buf()), expected, got: list(outside) });
    }
    let folder = path.parent().unwrap_or(Path::new(""));
    let missing: Vec<_> = shards.iter().filter(|shard| !folder.join(shard).is_file()).collect();
    if !missing.is_empty() {
        let expected = "the shards that the index names".into();
        let got = format!("no file {}", list(missing));
        return Err(AttentionError::Checkpoint { path: Some(path.to_path_buf()), expected, got });
    }
    Ok(weight_map)
}
