//! [`save_peft`]: the adapter of several layers as a folder that PEFT reads.

use std::collections::{BTreeSet, HashMap};
use std::path::Path;

use attention_files::FileError;
use candle_core::Tensor;
use serde_json::json;

use crate::adapter::config::LoraConfig;
use crate::adapter::peft::config::{Exception, to_text};
use crate::adapter::peft::{CONFIG, InLayout, PeftExtras, WEIGHTS, WRAPPER};
use crate::checkpoint::{Layout, Module, prefixed, serialise};
use crate::error::{AttentionError, Result};
use crate::memory;
use crate::projection::{LowRank, Projection};

/// Writes an adapter of these layers, each with its path in the model, as PEFT writes it. Each file is replaced as a whole or not at
/// all.
///
/// If several projections are one matrix in the layout and have matrices of their own, that matrix gets an adapter of the sum of their
/// ranks, which computes the same.
///
/// # Errors
///
/// A layer without an adapter of this name; configs that differ; a projection for which the layout has no linear layer; matrices that
/// aren't finite; a folder that can't be written to.
pub fn save_peft<L: InLayout>(
    folder: impl AsRef<Path>,
    name: &str,
    layout: Layout,
    layers: &[(&str, &L)],
    extras: &PeftExtras,
) -> Result<()> {
    let Some((_, first)) = layers.first() else {
        let (expected, got) = ("at least one layer".into(), "none".into());
        return Err(AttentionError::Adapter { name: name.into(), expected, got }.into());
    };
    let config = first.adapter_config(name)?;
    let mut files = Files { config, tensors: vec![], exceptions: vec![], modules: vec![] };
    for (path, layer) in layers {
        files.add(name, layout, path, *layer)?;
    }
    files.check_paths(name)?;
    files.write(folder.as_ref(), layout, extras)
}

/// What the two files will hold.
struct Files {
    config: LoraConfig,
    tensors: Vec<(String, Tensor)>,
    /// The modules whose rank or alpha isn't the config's.
    exceptions: Vec<Exception>,
    /// All modules that have an adapter.
    modules: Vec<String>,
}

impl Files {
    /// Adds the adapter of a layer.
    fn add<L: InLayout>(&mut self, name: &str, layout: Layout, path: &str, layer: &L) -> Result<()> {
        check_same(name, &self.config, &layer.adapter_config(name)?)?;
        let projections = layer.projections();
        let low_rank = |target: &str| {
            let found = projections.iter().find(|(other, _)| other == target);
            found.and_then(|(_, projection)| projection.adapter(name).ok()?.low_rank.as_ref())
        };
        let adapted = projections.iter().map(|(target, _)| target.as_str()).filter(|target| low_rank(target).is_some());
        let mut left: BTreeSet<&str> = adapted.collect();
        for module in layer.plan(layout)?.modules() {
            let parts: Vec<_> = module.projections().map(low_rank).collect();
            if let Some(joined) = joined(&module, &parts, &projections)? {
                left.retain(|target| module.projections().all(|other| other != *target));
                self.add_module(prefixed(path, &module.name), joined)?;
            }
        }
        match left.first() {
            None => Ok(()),
            Some(target) => {
                let expected = format!("targets that are linear layers in the layout {layout}");
                Err(AttentionError::Adapter { name: name.into(), expected, got: target.to_string() }.into())
            }
        }
    }

    fn add_module(&mut self, module: String, (a, b, scale): (Tensor, Tensor, f64)) -> Result<()> {
        let (config, rank) = (&self.config, a.dim(0)?);
        if rank != config.rank || scale != config.scale() {
            // That of the config, if it gives this scale: a quotient may be another number by rounding.
            let is_its_own = config.scale_of(rank, config.alpha) == scale;
            let alpha = if is_its_own { config.alpha } else { scale / config.scale_of(rank, 1.0) };
            self.exceptions.push(Exception { module: module.clone(), rank, alpha });
        }
        self.tensors.push((format!("{WRAPPER}.{module}.lora_A.weight"), a));
        self.tensors.push((format!("{WRAPPER}.{module}.lora_B.weight"), b));
        self.modules.push(module);
        Ok(())
    }

    /// Refuses two layers of one path.
    fn check_paths(&mut self, name: &str) -> Result<(), AttentionError> {
        self.modules.sort();
        let Some(pair) = self.modules.windows(2).find(|pair| pair[0] == pair[1]) else { return Ok(()) };
        let (expected, got) = ("a path of its own for each layer".into(), format!("`{}` twice", pair[0]));
        Err(AttentionError::Adapter { name: name.into(), expected, got })
    }

    fn write(mut self, folder: &Path, layout: Layout, extras: &PeftExtras) -> Result<()> {
        let saved = extras.modules_to_save.iter().filter_map(|(name, _)| name.rsplit_once('.'));
        let saved: BTreeSet<_> = saved.map(|(module, _)| module.to_string()).collect();
        let wrapped = |(name, tensor): &(String, Tensor)| (format!("{WRAPPER}.{name}"), tensor.clone());
        self.tensors.extend(extras.modules_to_save.iter().map(wrapped));
        let bytes = serialise(self.tensors.iter().map(|(name, tensor)| (name.clone(), tensor)), HashMap::new())?;
        let mut others = extras.others.clone();
        others.insert("base_model_name_or_path".into(), json!(extras.base_model_name_or_path));
        others.insert("task_type".into(), json!(extras.task_type));
        // GPT-2's matrices are (in, out).
        others.insert("fan_in_fan_out".into(), json!(layout == Layout::Gpt2));
        let saved: Vec<_> = saved.into_iter().collect();
        let text = to_text(&self.config, &self.modules, &self.exceptions, &saved, &others);
        let text = text.map_err(candle_core::Error::wrap)?;
        std::fs::create_dir_all(folder).map_err(|cause| FileError {
            path: folder.to_path_buf(),
            action: "write",
            cause: cause.to_string(),
        })?;
        attention_files::write(&folder.join(WEIGHTS), &bytes)?;
        Ok(attention_files::write(&folder.join(CONFIG), &text)?)
    }
}

/// A, B and s of a module from those of its projections; `None` if none of them has an adapter.
///
/// A that all share stays as it is. Others are stacked: \[B_0·A_0; B_1·A_1\] is \[B_0, 0; 0, B_1\] · \[A_0; A_1\].
fn joined(
    module: &Module,
    parts: &[Option<&LowRank>],
    projections: &[(String, &Projection)],
) -> Result<Option<(Tensor, Tensor, f64)>> {
    let Some(first) = parts.iter().copied().flatten().next() else { return Ok(None) };
    let is_shared = parts.iter().all(|part| part.is_some_and(|x| x.a.id() == first.a.id() && x.scale == first.scale));
    if is_shared {
        let b: Vec<_> = parts.iter().copied().flatten().map(|part| part.b.detach()).collect();
        return Ok(Some((first.a.detach(), module.join(&b)?, first.scale)));
    }
    let present: Vec<_> = parts.iter().copied().flatten().collect();
    // The scale of all: B takes the quotients, which are at most 1.
    let scale = present.iter().map(|part| part.scale).max_by(|a, b| a.abs().total_cmp(&b.abs())).unwrap_or(first.scale);
    let rank = present.iter().try_fold(0, |rank, part| Ok::<_, candle_core::Error>(rank + part.a.dim(0)?))?;
    // A, and each B with its zeros, three times.
    let bytes = [[rank, module.inputs], [3 * module.outputs(), rank]].map(|dims| memory::bytes(&dims, first.a.dtype()));
    memory::ask("joined matrices of an adapter", first.a.device(), memory::sum(bytes))?;
    let a = Tensor::cat(&present.iter().map(|part| part.a.detach()).collect::<Vec<_>>(), 0)?;
    let (mut rows, mut start) = (Vec::new(), 0);
    for (part, target) in parts.iter().zip(module.projections()) {
        let weight = projections.iter().find(|(name, _)| name == target).map(|(_, projection)| projection.weight());
        let outputs = weight.map_or(Ok(0), |weight| weight.dim(0))?;
        let zeros = |columns: usize| Tensor::zeros((outputs, columns), a.dtype(), a.device());
        rows.push(match part {
            None => zeros(rank)?,
            Some(part) => {
                let b = part.b.detach();
                let b = if part.scale == scale { b } else { (b * (part.scale / scale))? };
                let (before, own) = (start, b.dim(1)?);
                start += own;
                Tensor::cat(&[zeros(before)?, b, zeros(rank - before - own)?], 1)?
            }
        });
    }
    Ok(Some((a, module.join(&rows)?, scale)))
}

/// Refuses layers whose adapters of one name have other configs.
fn check_same(name: &str, config: &LoraConfig, other: &LoraConfig) -> Result<(), AttentionError> {
    let of = |config: &LoraConfig| {
        format!("rank {}, alpha {}, dropout_p {}", config.rank, config.alpha, config.dropout_p)
            + if config.use_rslora { ", use_rslora" } else { "" }
    };
    if of(config) == of(other) {
        return Ok(());
    }
    let expected = format!("the same config in all layers: {}", of(config));
    Err(AttentionError::Adapter { name: name.into(), expected, got: of(other) })
}
