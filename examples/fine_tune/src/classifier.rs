//! The encoder, the mean over the tokens, and a linear head.

use std::path::Path;

use anyhow::Result;
use attention_examples::random::Random;
use candle_attention::Layout;
use candle_attention::adapter::{Adapt, LoraConfig, PeftExtras, save_peft};
use candle_attention::block::{TransformerBlock, linear};
use candle_attention::quantised::Quantise;
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{VarBuilder, VarMap};
use minilm::model::{Encoder, Model, Sentence};

use crate::arguments::Arguments;
use crate::data::Example;

/// The name of the adapter.
const NAME: &str = "default";
/// Complaint and praise.
const CLASSES: usize = 2;
/// Sentences that are computed at once where nothing is learnt.
const AT_ONCE: usize = 32;

/// Where PEFT's files have what a name of this crate stands for.
const MODULES: [(&str, &str); 6] = [
    ("attention.q_proj", "attention.self.query"),
    ("attention.k_proj", "attention.self.key"),
    ("attention.v_proj", "attention.self.value"),
    ("attention.o_proj", "attention.output.dense"),
    ("mlp.up", "intermediate.dense"),
    ("mlp.down", "output.dense"),
];

/// The encoder, untouched or adapted, whose sentence embedding is the mean over the tokens.
pub struct Embedder<'m> {
    model: &'m Model,
    encoder: Encoder,
}

/// An adapted encoder with a head.
pub struct Classifier<'m> {
    embedder: Embedder<'m>,
    head: Head,
}

/// Weight (classes, width) and bias (classes).
#[derive(Clone)]
pub struct Head {
    pub weight: Var,
    pub bias: Var,
}

impl Head {
    /// The initial numbers of a seed.
    pub fn new(width: usize, seed: u64, device: &Device) -> Result<Self> {
        let var = |name: &str, shape: &[usize]| {
            let name = format!("base_model.model.classifier.{name}");
            anyhow::Ok(Var::from_tensor(&initial(seed, &name, shape, width, device)?)?)
        };
        Ok(Self { weight: var("weight", &[CLASSES, width])?, bias: var("bias", &[CLASSES])? })
    }

    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Ok(linear(x, &self.weight, Some(&self.bias))?)
    }

    pub fn parameters(&self) -> Vec<(String, Var)> {
        vec![("classifier.weight".into(), self.weight.clone()), ("classifier.bias".into(), self.bias.clone())]
    }
}

/// Numbers uniform in ±1/sqrt(width), as `parity.py` draws them.
fn initial(seed: u64, name: &str, shape: &[usize], width: usize, device: &Device) -> Result<Tensor> {
    let (mut random, bound) = (Random::new(seed, name, 0), (width as f64).powf(-0.5));
    let numbers: Vec<f32> = (0..shape.iter().product()).map(|_| ((2.0 * random.unit() - 1.0) * bound) as f32).collect();
    Ok(Tensor::from_vec(numbers, shape, device)?)
}

impl<'m> Embedder<'m> {
    /// The untouched encoder, or its weights in blocks of a few bits.
    pub fn new(model: &'m Model, arguments: &Arguments) -> Result<Self> {
        let encoder = model.encoder().clone();
        let encoder = match arguments.quantise {
            Some(format) => encoder.map_blocks(|_, block| Ok(block.quantise(format.into())?))?,
            None => encoder,
        };
        Ok(Self { model, encoder })
    }

    /// With an adapter and a head of this seed.
    pub fn adapted(&self, arguments: &Arguments, seed: u64) -> Result<Classifier<'m>> {
        let config = LoraConfig { seed, ..arguments.lora() };
        let encoder = self.encoder.map_blocks(|layer, block| self.adapt(layer, block, &config))?;
        let head = Head::new(self.model.config.hidden_size, seed, self.model.device())?;
        Ok(Classifier { embedder: Self { model: self.model, encoder }, head })
    }

    fn adapt(&self, layer: usize, block: &TransformerBlock, config: &LoraConfig) -> Result<TransformerBlock> {
        let vb = VarBuilder::from_varmap(&VarMap::new(), DType::F32, self.model.device());
        let block = block.with_lora(NAME, config, vb.pp(path(layer)))?;
        for (name, tensor) in block.adapter_parameters(NAME)? {
            let Some(target) = name.strip_suffix(".lora_A.weight") else { continue };
            let module = MODULES.iter().find(|(own, _)| *own == target).map_or(target, |(_, module)| module);
            let file_name = format!("base_model.model.{}.{module}.lora_A.weight", path(layer));
            let width = self.model.config.hidden_size;
            let numbers = initial(config.seed, &file_name, tensor.dims(), width, tensor.device())?;
            Var::from_tensor(&tensor)?.set(&numbers)?;
        }
        Ok(block)
    }

    pub fn device(&self) -> &Device {
        self.model.device()
    }

    /// The mean of the last states of each sentence, (batch, width).
    fn embed(&self, sentences: &[&Sentence], train: bool) -> Result<Tensor> {
        let (ids, lengths) = self.model.batch(sentences)?;
        self.model.means(&self.encoder.forward_t(&ids, &lengths, train)?, &lengths)
    }

    /// The embeddings of all examples, in their order. Sentences of a like length are computed together.
    pub fn embed_all(&self, examples: &[Example]) -> Result<Tensor> {
        let mut order: Vec<usize> = (0..examples.len()).collect();
        order.sort_by_key(|&i| examples[i].sentence.ids.len());
        let mut parts = Vec::new();
        for chosen in order.chunks(AT_ONCE) {
            let sentences: Vec<_> = chosen.iter().map(|&i| &examples[i].sentence).collect();
            parts.push(self.embed(&sentences, false)?.detach());
        }
        let mut places = vec![0u32; order.len()];
        for (place, &i) in order.iter().enumerate() {
            places[i] = place as u32;
        }
        let places = Tensor::from_vec(places, order.len(), self.device())?;
        Ok(Tensor::cat(&parts, 0)?.index_select(&places, 0)?)
    }
}

impl Classifier<'_> {
    /// What is trained.
    pub fn parameters(&self) -> Result<Vec<(String, Var)>> {
        let mut parameters = self.head.parameters();
        for (layer, block) in self.embedder.encoder.blocks().iter().enumerate() {
            for (name, tensor) in block.adapter_parameters(NAME)? {
                parameters.push((format!("{}.{name}", path(layer)), Var::from_tensor(&tensor)?));
            }
        }
        Ok(parameters)
    }

    pub fn device(&self) -> &Device {
        self.embedder.device()
    }

    /// The logits (batch, classes) in training.
    pub fn logits(&self, sentences: &[&Sentence]) -> Result<Tensor> {
        self.head.forward(&self.embedder.embed(sentences, true)?)
    }

    /// The logits of all examples, in their order.
    pub fn logits_of_all(&self, examples: &[Example]) -> Result<Tensor> {
        Ok(self.head.forward(&self.embedder.embed_all(examples)?)?.detach())
    }

    /// Saves the adapter and the head as PEFT does, with the names of a `BertForSequenceClassification`. (That class gives its head the
    /// pooled first token instead of the mean.)
    pub fn save(&self, folder: &Path) -> Result<()> {
        let blocks = self.embedder.encoder.blocks();
        let paths: Vec<_> = (0..blocks.len()).map(path).collect();
        let layers: Vec<_> = paths.iter().map(String::as_str).zip(blocks).collect();
        let head = self.head.parameters().into_iter().map(|(name, var)| (name, var.as_tensor().clone()));
        let extras = PeftExtras {
            base_model_name_or_path: Some("sentence-transformers/all-MiniLM-L6-v2".into()),
            modules_to_save: head.collect(),
            ..Default::default()
        };
        Ok(save_peft(folder, NAME, Layout::Bert, &layers, &extras)?)
    }
}

/// The path of a layer in the model.
fn path(layer: usize) -> String {
    format!("bert.encoder.layer.{layer}")
}
