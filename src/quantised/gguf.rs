//! [`Gguf`]: weights from GGUF files.

use std::collections::HashMap;
use std::fs::File;
use std::io::BufReader;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use attention_files::FileError;
use candle_core::quantized::gguf_file::Content;
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Tensor};

use crate::block::{TransformerBlock, TransformerBlockConfig};
use crate::checkpoint::{LayerConfig, Parameters, Refused, cast, prefixed};
use crate::error::{AttentionError, Result};
use crate::memory;
use crate::projection::{Projections, Quantised, format_of, placeholder};
use crate::rotary::Pairing;

/// A GGUF file, whose tensors are read when a block asks for them.
pub struct Gguf {
    path: PathBuf,
    content: Content,
}

/// The names in a block of the models of Llama's family, and this crate's.
const NAMES: [(&str, &str); 25] = [
    ("attn_q.weight", "attention.q_proj.weight"),
    ("attn_q.bias", "attention.q_proj.bias"),
    ("attn_k.weight", "attention.k_proj.weight"),
    ("attn_k.bias", "attention.k_proj.bias"),
    ("attn_v.weight", "attention.v_proj.weight"),
    ("attn_v.bias", "attention.v_proj.bias"),
    ("attn_output.weight", "attention.o_proj.weight"),
    ("attn_output.bias", "attention.o_proj.bias"),
    ("attn_q_norm.weight", "attention.q_norm.weight"),
    ("attn_k_norm.weight", "attention.k_norm.weight"),
    ("attn_sinks.weight", "attention.sinks"),
    ("ffn_gate.weight", "mlp.gate.weight"),
    ("ffn_gate.bias", "mlp.gate.bias"),
    ("ffn_up.weight", "mlp.up.weight"),
    ("ffn_up.bias", "mlp.up.bias"),
    ("ffn_down.weight", "mlp.down.weight"),
    ("ffn_down.bias", "mlp.down.bias"),
    ("attn_norm.weight", "attention_norm.weight"),
    ("ffn_norm.weight", "mlp_norm.weight"),
    ("post_attention_norm.weight", "attention_post_norm.weight"),
    ("post_ffw_norm.weight", "mlp_post_norm.weight"),
    ("attn_norm.bias", "attention_norm.bias"),
    ("ffn_norm.bias", "mlp_norm.bias"),
    ("post_attention_norm.bias", "attention_post_norm.bias"),
    ("post_ffw_norm.bias", "mlp_post_norm.bias"),
];

/// A parameter as it comes from a file.
enum Stored {
    Numbers(Tensor),
    Blocks(Quantised),
}

impl Stored {
    /// The rows of each head with those of even index first, from rows in the order of rotary embedding by neighbours.
    fn split_halves(self, heads: usize) -> Result<Self, Refused> {
        let order = |rows: usize| {
            let head = rows / heads;
            (0..rows).map(move |row| row / head * head + (row % head % (head / 2)) * 2 + row % head / (head / 2))
        };
        Ok(match self {
            Self::Numbers(tensor) => {
                let order: Vec<u32> = order(tensor.dim(0)?).map(|row| row as u32).collect();
                Self::Numbers(tensor.index_select(&Tensor::new(order, tensor.device())?, 0)?)
            }
            Self::Blocks(quantised) => Self::Blocks(quantised.with_rows(order(quantised.dims()[0]))?),
        })
    }
}

/// The heads of a parameter whose rows rotary embedding by halves pairs, and a file of llama.cpp has by neighbours.
fn heads_to_split(config: &TransformerBlockConfig, parameter: &str) -> Option<usize> {
    let attention = &config.attention;
    attention.rotary.as_ref().filter(|rotary| rotary.pairing == Pairing::HalfSplit)?;
    match parameter {
        "attention.q_proj.weight" | "attention.q_proj.bias" => Some(attention.num_heads),
        "attention.k_proj.weight" | "attention.k_proj.bias" => Some(attention.num_kv_heads()),
        _ => None,
    }
}

impl Gguf {
    /// Reads the header of a file.
    ///
    /// # Errors
    ///
    /// A file that can't be read, or isn't GGUF.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let refused = |got: String| AttentionError::Checkpoint {
            path: Some(path.to_path_buf()),
            expected: "a GGUF file".into(),
            got,
        };
        let mut file = reader(path)?;
        // candle 0.11 divides by the alignment, which a damaged file may give as zero.
        let content = catch_unwind(AssertUnwindSafe(|| Content::read(&mut file)));
        let content = content.map_err(|_| refused("a header that can't be read".into()))?;
        let content = content.map_err(|error| refused(format!("another file: {error}")))?;
        Ok(Self { path: path.to_path_buf(), content })
    }

    /// The names of the tensors, in alphabetical order.
    pub fn tensor_names(&self) -> Vec<&str> {
        let mut names: Vec<&str> = self.content.tensor_infos.keys().map(String::as_str).collect();
        names.sort_unstable();
        names
    }

    /// A tensor as numbers, such as that of the embedding.
    ///
    /// # Errors
    ///
    /// A name that the file doesn't have; a truncated file; numbers that aren't finite; too little memory.
    pub fn tensor(&self, name: &str, dtype: DType, device: &Device) -> Result<Tensor> {
        self.numbers(name, dtype, device).map_err(|refused| match refused {
            Refused::Memory(error) => error.into(),
            Refused::Tensor(problem) => {
                let (path, problems) = (Some(self.path.clone()), vec![format!("`{name}`: {problem}")]);
                AttentionError::CheckpointTensors { path, problems }.into()
            }
        })
    }

    /// Whether the rows of queries and keys are in the order of rotary embedding by neighbours, as llama.cpp writes those of its
    /// architecture `llama` (Llama, Mistral).
    fn pairs_neighbours(&self) -> bool {
        let architecture = self.content.metadata.get("general.architecture");
        architecture.and_then(|value| value.to_string().ok()).is_some_and(|name| name == "llama")
    }

    /// A parameter of this shape: numbers, or a matrix in blocks.
    fn parameter(&self, name: &str, shape: &[usize], dtype: DType, device: &Device) -> Result<Stored, Refused> {
        let info = self.content.tensor_infos.get(name).ok_or_else(|| format!("is missing, expected {shape:?}"))?;
        if info.shape.dims() != shape {
            return Err(format!("expected shape {shape:?}, got {:?}", info.shape.dims()).into());
        }
        match (info.ggml_dtype, format_of(info.ggml_dtype), shape) {
            (GgmlDType::F32 | GgmlDType::F16 | GgmlDType::BF16, _, _) => {
                Ok(Stored::Numbers(self.numbers(name, dtype, device)?))
            }
            (_, Some(format), &[outputs, inputs]) => {
                let blocks = self.read(name)?.data()?.into_owned();
                Ok(Stored::Blocks(Quantised::new(name, format, blocks, [outputs, inputs])?))
            }
            (got, _, _) => {
                Err(format!("expected Q8_0, Q4_0, Q5_0, Q4_K, Q5_K, Q6_K, f32, f16 or bf16, got {got:?}").into())
            }
        }
    }

    fn numbers(&self, name: &str, dtype: DType, device: &Device) -> Result<Tensor, Refused> {
        let stored = self.read(name)?;
        let elements = stored.shape().elem_count();
        memory::ask("tensor of a GGUF file", &Device::Cpu, memory::bytes(&[elements, 2], DType::F32))?;
        cast(&stored.dequantize(&Device::Cpu)?, dtype, device)
    }

    fn read(&self, name: &str) -> Result<QTensor, Refused> {
        let info = self.content.tensor_infos.get(name).ok_or_else(|| "is missing".to_string())?;
        let bytes = memory::bytes(info.shape.dims(), DType::U8);
        let blocks = bytes / info.ggml_dtype.block_size();
        memory::ask("tensor of a GGUF file", &Device::Cpu, blocks.saturating_mul(2 * info.ggml_dtype.type_size()))?;
        let mut file = reader(&self.path).map_err(Refused::from)?;
        Ok(info.read(&mut file, self.content.tensor_data_offset, &Device::Cpu)?)
    }
}

fn reader(path: &Path) -> Result<BufReader<File>, FileError> {
    Ok(BufReader::new(File::open(path).map_err(|cause| FileError::read(path, &cause))?))
}

impl TransformerBlock {
    /// A block from a GGUF file, whose `prefix` is the name of the block, such as `blk.0`. Weights of a quantised type stay in their
    /// blocks; those of f32, f16 and bf16 become numbers, as biases and norms do, which get `dtype`. Each weight may have a type of its own,
    /// as in files of llama.cpp's types Q4_K_M and Q5_K_M, which have some weights in Q6_K.
    ///
    /// The names are those of Llama's family (Llama, Mistral, Qwen, Gemma 2), where queries, keys and values are three matrices. The config is
    /// that of the same model on Hugging Face. Files of Llama and Mistral have the rows of queries and keys in the order of rotary embedding by
    /// neighbours. If the config has [`Pairing::HalfSplit`](crate::rotary::Pairing), they are brought into its order, so that adapters and
    /// layouts of Hugging Face fit. With `Pairing::Interleaved` they stay as they are. Files of Gemma have 1 + w as the weight of a norm, so the
    /// config's norm has no `unit_offset`.
    ///
    /// # Errors
    ///
    /// An invalid config; tensors that the file lacks, holds in another shape or in another type than Q8_0, Q4_0, Q5_0, Q4_K, Q5_K, Q6_K,
    /// f32, f16 and bf16, or that aren't finite; a truncated file. One error names all of them, and nothing is loaded.
    pub fn from_gguf(
        config: &TransformerBlockConfig,
        file: &Gguf,
        prefix: &str,
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        config.check_for(dtype)?;
        let (mut parameters, mut blocks, mut problems) = (Parameters::new(), HashMap::new(), Vec::new());
        for parameter in config.parameters() {
            let name = NAMES.iter().find(|(_, own)| *own == parameter.name).map(|(name, _)| prefixed(prefix, name));
            let Some(name) = name else {
                problems.push(format!("`{}`: expected none, since GGUF has no name for it", parameter.name));
                continue;
            };
            let stored = file.parameter(&name, &parameter.shape, dtype, device);
            let heads = heads_to_split(config, &parameter.name).filter(|_| file.pairs_neighbours());
            let in_order = |stored: Stored| match heads {
                Some(heads) => stored.split_halves(heads),
                None => Ok(stored),
            };
            match stored.and_then(in_order) {
                Ok(Stored::Numbers(tensor)) => parameters.push((parameter.name, tensor)),
                Ok(Stored::Blocks(quantised)) => {
                    parameters.push((parameter.name.clone(), placeholder(&parameter.shape, dtype, device)?));
                    blocks.insert(parameter.name.into_owned(), Arc::new(quantised));
                }
                Err(Refused::Memory(error)) => return Err(error.into()),
                Err(Refused::Tensor(problem)) => problems.push(format!("`{name}`: {problem}")),
            }
        }
        if !problems.is_empty() {
            return Err(AttentionError::CheckpointTensors { path: Some(file.path.clone()), problems }.into());
        }
        let block = Self::from_parameters(config, parameters, prefix)?;
        block.map_projections(&mut |name, projection| {
            Ok(match blocks.remove(&format!("{name}.weight")) {
                Some(quantised) => projection.with_quantised(quantised)?,
                None => projection.clone(),
            })
        })
    }
}
