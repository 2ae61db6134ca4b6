//! [`PeftAdapter`]: a folder that PEFT wrote, attached to layers.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::Arc;

use candle_core::{Device, Tensor, Var};
use serde_json::Value;

use crate::adapter::adapt::{attach, check_name, check_scale};
use crate::adapter::config::{LoraConfig, Target};
use crate::adapter::peft::config::PeftConfig;
use crate::adapter::peft::matching::Rules;
use crate::adapter::peft::{CONFIG, InLayout, PeftExtras, WEIGHTS, WRAPPER};
use crate::checkpoint::{self, Layout, Module, Parameters, Refused, cast, is_finite, prefixed};
use crate::error::{AttentionError, Result};
use crate::memory;
use crate::projection::{LowRank, Projections};

/// An adapter's folder, of which each layer takes its part.
pub struct PeftAdapter {
    config: PeftConfig,
    rules: Rules,
    tensors: BTreeMap<String, Tensor>,
}

impl PeftAdapter {
    /// Reads a folder.
    ///
    /// # Errors
    ///
    /// A file that is missing or can't be read; a config of another method than LoRA, or with a feature that this crate doesn't have,
    /// which the error names (DoRA, biases, embeddings, initialisations that change the base); a weights file that isn't safetensors.
    pub fn read(folder: impl AsRef<Path>) -> Result<Self> {
        let (config_path, weights_path) = (folder.as_ref().join(CONFIG), folder.as_ref().join(WEIGHTS));
        let text = attention_files::read(&config_path)?;
        let config = PeftConfig::parse(&text).map_err(|error| error.at(&config_path))?;
        let rules = Rules::new(&config).map_err(|error| error.at(&config_path))?;
        let bytes = attention_files::read(&weights_path)?;
        memory::ask("tensors of an adapter", &Device::Cpu, bytes.len())?;
        let tensors = candle_core::safetensors::load_buffer(&bytes, &Device::Cpu)
            .map_err(|error| checkpoint::not_safetensors(&bytes, &error).at(&weights_path))?;
        Ok(Self { config, rules, tensors: tensors.into_iter().collect() })
    }

    /// The layers with this adapter under a name of their own, each with its path in the model. The matrices are variables of the dtype
    /// and on the device of the layer, so that training can continue, and the adapter becomes the active one.
    ///
    /// If several projections are one matrix in the layout (`c_attn` of GPT-2), they share one A.
    ///
    /// # Errors
    ///
    /// Matrices that are missing, of another shape than the layers and the config's rank ask for, or not finite; none of the layers is
    /// changed then, and one error names all of them. A name that another adapter has; a layout that the layer can't have.
    pub fn attach<L: InLayout>(&mut self, name: &str, layout: Layout, layers: &[(&str, &L)]) -> Result<Vec<L>> {
        let (mut attached, mut used, mut problems) = (Vec::new(), Vec::new(), Vec::new());
        for (path, layer) in layers {
            check_name(*layer, name)?;
            let mut of_layer = HashMap::new();
            for module in layer.plan(layout)?.modules() {
                let full = prefixed(path, &module.name);
                if !self.rules.is_target(&full) {
                    continue;
                }
                of_layer.extend(self.low_ranks(*layer, &module, &full, &mut problems)?.into_iter().flatten());
                used.push(full);
            }
            let config = LoraConfig { targets: targets(of_layer.keys()), ..self.config.lora() };
            attached.push(attach(*layer, name, &config, |target| of_layer.get(target).cloned())?);
        }
        if !problems.is_empty() {
            problems.extend(self.unexpected(&used));
            return Err(AttentionError::CheckpointTensors { path: None, problems }.into());
        }
        for full in used {
            self.tensors.remove(&format!("{WRAPPER}.{full}.lora_A.weight"));
            self.tensors.remove(&format!("{WRAPPER}.{full}.lora_B.weight"));
        }
        Ok(attached)
    }

    /// The matrices of a module's projections, or `None` with what is wrong with them among the problems.
    fn low_ranks<L: Projections>(
        &self,
        layer: &L,
        module: &Module,
        full: &str,
        problems: &mut Vec<String>,
    ) -> Result<Option<Vec<(String, LowRank)>>> {
        let (rank, alpha) = self.rules.rank_and_alpha(full);
        if rank == 0 {
            problems.push(format!("`{full}`: expected a rank of at least 1, got 0"));
            return Ok(None);
        }
        let weights = layer.projections();
        let like = weights.iter().find(|(name, _)| module.projections().next() == Some(name)).map(|(_, x)| x.weight());
        let Some(like) = like else { return Ok(None) };
        let mut get = |matrix: &str, shape: [usize; 2]| -> Result<Option<Tensor>> {
            let tensor = format!("{WRAPPER}.{full}.{matrix}.weight");
            let problem = match self.tensors.get(&tensor) {
                None => format!("is missing, expected {shape:?}"),
                Some(x) if x.dims() != shape => format!("expected shape {shape:?}, got {:?}", x.dims()),
                Some(x) => match cast(x, like.dtype(), like.device()) {
                    Ok(x) => return Ok(Some(Var::from_tensor(&x)?.into_inner())),
                    Err(Refused::Memory(error)) => return Err(error.into()),
                    Err(Refused::Tensor(problem)) => problem,
                },
            };
            problems.push(format!("`{tensor}`: {problem}"));
            Ok(None)
        };
        let scale = self.config.lora().scale_of(rank, alpha);
        let (a, b) = (get("lora_A", [rank, module.inputs])?, get("lora_B", [module.outputs(), rank])?);
        if let Err(error) = check_scale(scale, like.dtype()) {
            problems.push(format!("`{full}`: {error}"));
            return Ok(None);
        }
        let (Some(a), Some(b)) = (a, b) else { return Ok(None) };
        let names: Vec<_> = module.projections().collect();
        let (parts, input): (Parameters, Option<Arc<str>>) = match names[..] {
            // A matrix that is whole keeps its variable.
            [name] => (vec![(name.to_string().into(), b)], None),
            _ => (module.split(&b)?, Some(module.name.as_str().into())),
        };
        let low_rank = |b| LowRank { a: a.clone(), b, scale, input: input.clone() };
        Ok(Some(parts.into_iter().map(|(name, b)| (name.into_owned(), low_rank(b))).collect()))
    }

    /// The tensors that no module of these names has, and that aren't saved as a whole.
    fn unexpected(&self, used: &[String]) -> Vec<String> {
        let is_known = |tensor: &str| used.iter().any(|full| is_of(tensor, full)) || self.is_saved(tensor);
        let unexpected = self.tensors.keys().filter(|tensor| !is_known(tensor));
        unexpected.map(|tensor| format!("`{tensor}` is unexpected")).collect()
    }

    /// Whether the tensor belongs to a module that is saved as a whole.
    fn is_saved(&self, tensor: &str) -> bool {
        let module = tensor.strip_prefix(WRAPPER).and_then(|name| name.strip_prefix('.'));
        module.and_then(|name| name.rsplit_once('.')).is_some_and(|(module, _)| self.rules.is_saved(module))
    }

    /// What the folder holds beside the matrices that the layers have taken.
    ///
    /// # Errors
    ///
    /// Matrices that no layer has taken: those of other layers, or of another model; modules that were saved as a whole, with numbers that
    /// aren't finite. The error names all of them.
    pub fn finish(self) -> Result<PeftExtras> {
        let mut problems = self.unexpected(&[]);
        for (name, tensor) in self.tensors.iter().filter(|(name, _)| self.is_saved(name)) {
            if !is_finite(tensor)? {
                problems.push(format!("`{name}`: expected finite numbers, got NaN or infinity"));
            }
        }
        if !problems.is_empty() {
            return Err(AttentionError::CheckpointTensors { path: None, problems }.into());
        }
        let text = |field: &str| self.config.others.get(field).and_then(Value::as_str).map(str::to_string);
        let without_wrapper = |name: String| name.split_at(WRAPPER.len() + 1).1.to_string();
        Ok(PeftExtras {
            base_model_name_or_path: text("base_model_name_or_path"),
            task_type: text("task_type"),
            modules_to_save: self.tensors.into_iter().map(|(name, x)| (without_wrapper(name), x)).collect(),
            others: self.config.others,
        })
    }
}

/// Whether a tensor is a matrix of the module.
fn is_of(tensor: &str, full: &str) -> bool {
    let rest = tensor.strip_prefix(WRAPPER).and_then(|rest| rest.strip_prefix('.')?.strip_prefix(full));
    matches!(rest, Some(".lora_A.weight" | ".lora_B.weight"))
}

/// The targets with these names, which may have a prefix.
fn targets<'n>(names: impl Iterator<Item = &'n String>) -> Vec<Target> {
    let mut targets: Vec<Target> = names.filter_map(|name| name.rsplit('.').next()?.parse().ok()).collect();
    targets.sort();
    targets.dedup();
    targets
}
