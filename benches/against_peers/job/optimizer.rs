//! Steps of AdamW.

use std::cell::RefCell;

use candle_attention::train::{AdamW, AdamWConfig};
use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::{Optimizer, ParamsAdamW};

use super::{Contender, Inputs, Trained};

/// Each contender has parameters of its own, since a step changes them.
pub struct Steps {
    ours: RefCell<Side<AdamW>>,
    candle: RefCell<Side<candle_nn::AdamW>>,
}

struct Side<O> {
    optimizer: O,
    parameters: Trained,
    gradients: GradStore,
}

impl Steps {
    pub fn new(inputs: &Inputs, lr: f64) -> Result<Self> {
        let (parameters, gradients) = copies(inputs)?;
        let optimizer = AdamW::new(&parameters, AdamWConfig { lr, ..Default::default() })?;
        let ours = RefCell::new(Side { optimizer, parameters, gradients });
        let (parameters, gradients) = copies(inputs)?;
        let variables = parameters.iter().map(|(_, var)| var.clone()).collect();
        let optimizer = candle_nn::AdamW::new(variables, ParamsAdamW { lr, ..Default::default() })?;
        Ok(Self { ours, candle: RefCell::new(Side { optimizer, parameters, gradients }) })
    }

    pub fn step(&self, contender: Contender) -> Result<()> {
        match contender {
            Contender::Ours | Contender::OursFused => {
                let Side { optimizer, gradients, .. } = &mut *self.ours.borrow_mut();
                Ok(optimizer.step(gradients)?)
            }
            Contender::Candle | Contender::CandleFlash => {
                let Side { optimizer, gradients, .. } = &mut *self.candle.borrow_mut();
                optimizer.step(gradients)
            }
        }
    }

    /// The parameters after the contender's next step.
    pub fn answer(&self, contender: Contender) -> Result<Vec<(String, Tensor)>> {
        self.step(contender)?;
        let values = |parameters: &Trained| {
            parameters.iter().map(|(name, var)| (name.clone(), var.as_detached_tensor())).collect()
        };
        Ok(match contender {
            Contender::Ours | Contender::OursFused => values(&self.ours.borrow().parameters),
            Contender::Candle | Contender::CandleFlash => values(&self.candle.borrow().parameters),
        })
    }
}

/// New variables and their gradients.
fn copies(inputs: &Inputs) -> Result<(Trained, GradStore)> {
    // candle makes a store of gradients only in a backward pass.
    let mut gradients = Var::zeros((), DType::F32, &Device::Cpu)?.backward()?;
    let mut parameters = Vec::new();
    for (name, tensor) in inputs.0.iter().filter(|(name, _)| !name.starts_with("grad_")) {
        let var = Var::from_tensor(tensor)?;
        gradients.insert(&var, inputs.get(&format!("grad_{name}"))?.clone());
        parameters.push((name.clone(), var));
    }
    Ok((parameters, gradients))
}
