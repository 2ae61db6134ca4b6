//! The state of AdamW in safetensors: the moments and the master copy of each parameter, and in the metadata the count of steps and the
//! settings.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use candle_core::safetensors::Load;
use candle_core::{DType, Device, Tensor};
use safetensors::SafeTensors;
use serde::{Deserialize, Serialize};

use crate::check::compute_dtype;
use crate::checkpoint::{is_finite, metadata_entry, not_safetensors, serialise};
use crate::error::{AttentionError, Result};
use crate::memory;
use crate::train::adamw::moments::{Kept, Moments};
use crate::train::adamw::{AdamW, AdamWConfig, Trained};

/// The metadata entry that holds the [`Header`] as JSON.
const METADATA_KEY: &str = "candle_attention_adamw";
/// The tensors of a parameter follow its name.
const PARTS: [&str; 2] = ["first_moment", "second_moment"];
/// The third tensor, of parameters that have one.
const MASTER: &str = "master_weight";

/// So many steps nobody takes, and the count of a 32-bit machine has room for one more.
const MOST_STEPS: usize = u32::MAX as usize / 2;

/// The metadata of a saved state.
#[derive(Serialize, Deserialize)]
struct Header {
    steps: usize,
    /// Of the parameters that have taken fewer steps.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    parameter_steps: BTreeMap<String, usize>,
    config: AdamWConfig,
}

impl AdamW {
    /// The moments of each parameter, as `<name>.first_moment` and `<name>.second_moment`, and its master copy, if it has one, as
    /// `<name>.master_weight`. They are copies.
    ///
    /// # Errors
    ///
    /// Too little memory.
    pub fn state(&self) -> Result<HashMap<String, Tensor>> {
        let mut state = HashMap::new();
        for parameter @ Trained { var, moments, .. } in &self.parameters {
            memory::ask_for("state of AdamW", 3, var, compute_dtype(var.dtype()))?;
            let Kept { moments, master } = moments.to_tensors(var)?;
            state.extend(PARTS.map(|part| parameter.tensor(part)).into_iter().zip(moments));
            state.extend(master.map(|master| (parameter.tensor(MASTER), master)));
        }
        Ok(state)
    }

    /// Takes over a [`state`](Self::state) that was read from a file of another form, after so many steps, all of which had every
    /// gradient.
    ///
    /// # Errors
    ///
    /// As [`AdamW::load`].
    pub fn set_state(&mut self, state: &HashMap<String, Tensor>, steps: usize) -> Result<()> {
        let header = Header { steps, parameter_steps: BTreeMap::new(), config: self.config };
        let json = serde_json::to_string(&header).map_err(candle_core::Error::wrap)?;
        let named = state.iter().map(|(name, tensor)| (name.clone(), tensor));
        self.load_bytes(&serialise(named, HashMap::from([(METADATA_KEY.to_string(), json)]))?)
    }

    /// The bytes of a safetensors file with the [`state`](Self::state), the count of steps and the settings.
    ///
    /// # Errors
    ///
    /// Too little memory.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        let fewer = self.parameters.iter().filter(|parameter| parameter.steps != self.steps);
        let parameter_steps = fewer.map(|parameter| (parameter.name.clone(), parameter.steps)).collect();
        let header = Header { steps: self.steps, parameter_steps, config: self.config };
        let json = serde_json::to_string(&header).map_err(candle_core::Error::wrap)?;
        let mut tensors: Vec<_> = self.state()?.into_iter().collect();
        tensors.sort_by(|(a, _), (b, _)| a.cmp(b));
        let named = tensors.iter().map(|(name, tensor)| (name.clone(), tensor));
        serialise(named, HashMap::from([(METADATA_KEY.to_string(), json)]))
    }

    /// Saves the state. The file is replaced as a whole or not at all.
    ///
    /// # Errors
    ///
    /// A file that can't be written; too little memory.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        Ok(attention_files::write(path.as_ref(), &self.to_bytes()?)?)
    }

    /// Takes over the moments, the master copies and the counts of steps that [`AdamW::save`] wrote, for the same parameters. With their
    /// saved values, and with the same config, the next steps are those of a run that was never interrupted, to the last bit.
    ///
    /// The config stays this optimizer's own.
    ///
    /// # Errors
    ///
    /// A file that can't be read or isn't such a state; tensors that are missing, unexpected, or of another shape or dtype, or not
    /// finite, all of them in one error; too little memory. Then nothing has changed. An optimizer
    /// [with master copies](AdamW::with_master_weights) loads a state with them, and one without loads a state without.
    pub fn load(&mut self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        let bytes = attention_files::read(path)?;
        self.load_bytes(&bytes).map_err(|error| error.at(path))
    }

    /// As [`AdamW::load`], from the bytes of a file.
    ///
    /// # Errors
    ///
    /// As [`AdamW::load`].
    pub fn load_bytes(&mut self, bytes: &[u8]) -> Result<()> {
        let json = metadata_entry(bytes, METADATA_KEY, "steps and settings", "an AdamW")?;
        let header: Header = serde_json::from_str(&json).map_err(|error| AttentionError::Checkpoint {
            path: None,
            expected: format!("steps and settings in the metadata entry `{METADATA_KEY}`"),
            got: format!("{}, which can't be read: {error}", json.chars().take(80).collect::<String>()),
        })?;
        let tensors = SafeTensors::deserialize(bytes).map_err(|error| not_safetensors(bytes, &error))?;
        self.check_tensors(&tensors, &header)?;
        let (mut loaded, mut problems) = (Vec::new(), Vec::new());
        for parameter in &self.parameters {
            match parameter.load(&tensors)? {
                Ok(moments) => loaded.push(moments),
                Err(problem) => problems.push(problem),
            }
        }
        if !problems.is_empty() {
            return Err(AttentionError::OptimizerState { path: None, problems }.into());
        }
        for (parameter, moments) in self.parameters.iter_mut().zip(loaded) {
            parameter.steps = header.parameter_steps.get(&parameter.name).copied().unwrap_or(header.steps);
            parameter.moments = moments;
        }
        self.steps = header.steps;
        Ok(())
    }

    /// Checks names, shapes and dtypes of all tensors.
    fn check_tensors(&self, tensors: &SafeTensors, header: &Header) -> Result<(), AttentionError> {
        let mut problems = Vec::new();
        let mut unexpected: Vec<_> = tensors.names().iter().map(|name| name.to_string()).collect();
        for (Trained { var, .. }, name) in
            self.parameters.iter().flat_map(|x| x.parts().map(move |part| (x, x.tensor(part))))
        {
            unexpected.retain(|other| *other != name);
            let expected = compute_dtype(var.dtype());
            match tensors.tensor(&name) {
                Err(_) => problems.push(format!("`{name}` is missing, expected {:?}", var.dims())),
                Ok(view) if view.shape() != var.dims() => {
                    problems.push(format!("`{name}`: expected shape {:?}, got {:?}", var.dims(), view.shape()));
                }
                Ok(view) if DType::try_from(view.dtype()).ok() != Some(expected) => {
                    problems.push(format!("`{name}`: expected dtype {expected:?}, got {:?}", view.dtype()));
                }
                Ok(_) => {}
            }
        }
        unexpected.sort_unstable();
        let is_master = |name: &String| self.parameters.iter().any(|parameter| parameter.tensor(MASTER) == *name);
        let reason = |name| if is_master(name) { ", since the parameter has no master copy" } else { "" };
        problems.extend(unexpected.iter().map(|name| format!("`{name}` is unexpected{}", reason(name))));
        let is_known = |name: &String| self.parameters.iter().any(|parameter| parameter.name == *name);
        let unknown = header.parameter_steps.keys().filter(|name| !is_known(name));
        problems.extend(unknown.map(|name| format!("the steps of `{name}` are unexpected")));
        let counts = header.parameter_steps.values().chain([&header.steps]);
        if let Some(steps) = counts.copied().find(|&steps| steps > MOST_STEPS) {
            problems.push(format!("expected at most {MOST_STEPS} steps, got {steps}"));
        }
        if problems.is_empty() { Ok(()) } else { Err(AttentionError::OptimizerState { path: None, problems }) }
    }
}

impl Trained {
    /// What the names of the parameter's tensors end with.
    fn parts(&self) -> impl Iterator<Item = &'static str> {
        PARTS.into_iter().chain(self.moments.has_master().then_some(MASTER))
    }

    /// The name of one of the parameter's tensors.
    fn tensor(&self, part: &str) -> String {
        format!("{}.{part}", self.name)
    }

    /// The parameter's moments and master copy, or what is wrong with them.
    fn load(&self, tensors: &SafeTensors) -> Result<std::result::Result<Moments, String>> {
        memory::ask_for("state of AdamW", 6, &self.var, compute_dtype(self.var.dtype()))?;
        let load = |part: &str| -> Result<std::result::Result<Tensor, String>> {
            let name = self.tensor(part);
            let tensor = tensors.tensor(&name).map_err(candle_core::Error::from)?.load(&Device::Cpu)?;
            if !is_finite(&tensor)? {
                return Ok(Err(format!("`{name}`: expected finite numbers, got NaN or infinity")));
            }
            // A second moment is a mean of squares, and the step takes its root.
            let is_root = part == PARTS[1] && tensor.elem_count() > 0;
            if is_root && tensor.min_all()?.to_dtype(DType::F64)?.to_scalar::<f64>()? < 0.0 {
                return Ok(Err(format!("`{name}`: expected numbers of at least 0, got less")));
            }
            Ok(Ok(tensor))
        };
        let master = self.moments.has_master().then(|| load(MASTER)).transpose()?.transpose();
        Ok(match (load(PARTS[0])?, load(PARTS[1])?, master) {
            (Ok(first), Ok(second), Ok(master)) => {
                Ok(Moments::from_tensors(&Kept { moments: [first, second], master }, &self.var)?)
            }
            (Err(problem), ..) | (_, Err(problem), _) | (.., Err(problem)) => Err(problem),
        })
    }
}
