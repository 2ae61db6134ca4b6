//! Adapters in the files that PEFT writes: a folder with `adapter_config.json` and `adapter_model.safetensors`.
//!
//! A file names each matrix after its module in the whole model: `base_model.model.` and the module's path, as in
//! `base_model.model.encoder.layer.0.attention.self.query.lora_A.weight`. The path depends on the class that PEFT wrapped: it is
//! `encoder.layer.0` in a `BertModel`, `bert.encoder.layer.0` in a `BertForSequenceClassification`, and `model.layers.0` in a
//! `LlamaForCausalLM`.

mod config;
mod load;
mod matching;
mod save;

use std::path::Path;

use candle_core::Tensor;
use serde_json::{Map, Value};

use crate::adapter::adapt::Adapt;
use crate::block::TransformerBlock;
use crate::checkpoint::{Layout, Plan};
use crate::error::{AttentionError, Result};
use crate::layer::{CrossAttention, SelfAttention};
pub use load::PeftAdapter;
pub use save::save_peft;

const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";
/// What PEFT puts before the name of every module.
const WRAPPER: &str = "base_model.model";

/// A layer whose linear layers have names in the checkpoints of other programs: [`SelfAttention`], [`CrossAttention`] and
/// [`TransformerBlock`].
pub trait InLayout: Adapt {
    /// The tensors of the layer in a layout.
    #[doc(hidden)]
    fn plan(&self, layout: Layout) -> Result<Plan, AttentionError>;
}

impl InLayout for SelfAttention {
    fn plan(&self, layout: Layout) -> Result<Plan, AttentionError> {
        Plan::of_attention(layout, self.config())
    }
}

impl InLayout for CrossAttention {
    fn plan(&self, layout: Layout) -> Result<Plan, AttentionError> {
        Plan::of_attention(layout, self.config())
    }
}

impl InLayout for TransformerBlock {
    fn plan(&self, layout: Layout) -> Result<Plan, AttentionError> {
        self.plan(layout)
    }
}

/// What an adapter's folder holds beside the matrices of the layers.
#[derive(Clone, Debug, Default)]
pub struct PeftExtras {
    /// The name or the path of the base model.
    pub base_model_name_or_path: Option<String>,
    /// What the model is for, as `CAUSAL_LM` or `SEQ_CLS`: PEFT needs it to load an adapter without being told the class.
    pub task_type: Option<String>,
    /// The tensors of modules that were trained and saved as a whole, such as `classifier.weight` of a head.
    pub modules_to_save: Vec<(String, Tensor)>,
    /// Other fields of the config, which change no number. They are written as they were read.
    pub others: Map<String, Value>,
}

/// Loads an adapter that PEFT or [`save_peft`] wrote onto all layers that it belongs to, each with its path in the model.
///
/// # Errors
///
/// As [`PeftAdapter::read`], [`PeftAdapter::attach`] and [`PeftAdapter::finish`].
///
/// # Examples
///
/// ```
/// use candle_attention::adapter::{Adapt, LoraConfig, PeftExtras, load_peft, save_peft};
/// use candle_attention::{Layout, SelfAttention, SelfAttentionConfig};
/// use candle_core::{DType, Device};
/// use candle_nn::{VarBuilder, VarMap};
///
/// let vb = || VarBuilder::from_varmap(&VarMap::new(), DType::F32, &Device::Cpu);
/// let base = SelfAttention::new(&SelfAttentionConfig::new(8, 2), vb())?;
/// let layer = base.with_lora("legal", &LoraConfig::new(2, 4.0), vb())?;
/// # let folder = tempfile::tempdir()?;
/// # let path = folder.path().join("legal");
/// let name = "encoder.layer.0.attention";
/// save_peft(&path, "legal", Layout::Bert, &[(name, &layer)], &PeftExtras::default())?;
/// let (layers, _) = load_peft(&path, "legal", Layout::Bert, &[(name, &base)])?;
/// assert_eq!(layers[0].adapter_config("legal")?.rank, 2);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn load_peft<L: InLayout>(
    folder: impl AsRef<Path>,
    name: &str,
    layout: Layout,
    layers: &[(&str, &L)],
) -> Result<(Vec<L>, PeftExtras)> {
    let folder = folder.as_ref();
    let mut adapter = PeftAdapter::read(folder)?;
    let attach_all = || {
        let layers = adapter.attach(name, layout, layers)?;
        Ok((layers, adapter.finish()?))
    };
    let result: Result<_> = attach_all();
    result.map_err(|error| error.at(&folder.join(WEIGHTS)))
}
