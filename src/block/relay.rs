//! A layer as one operation, with the gradients of many parameters.
//!
//! An operation of candle has at most three arguments, and a whole layer has more. Its parameters enter as one argument, a
//! *relay*: a tensor of one number that a chain of operations makes of all parameters. In the backward pass the layer's
//! operation computes the gradients of all parameters and leaves them here, and each operation of the chain, which candle visits
//! later, hands its own to its parameters.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, ThreadId};

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp2, CustomOp3, DType, Device, Layout, Result, Shape, Tensor, WithDType, bail};

use crate::block::op::{Dtype, slice, with_dtype};
use crate::block::operand::{LayerGradients, Reading, tensor};
use crate::gradient::give;
use crate::memory;

/// Gradients on their way from an operation to its parameters, by the thread of the backward pass: several threads may go through
/// one graph at the same time.
#[derive(Clone, Debug, Default)]
struct Gradients(Arc<Mutex<HashMap<ThreadId, Vec<Option<Tensor>>>>>);

impl Gradients {
    /// Leaves the gradients of a call's parameters, in their order: `None` for one that wants none.
    fn leave(&self, gradients: Vec<Option<Tensor>>) {
        self.lock().insert(thread::current().id(), gradients);
    }

    fn take(&self, number: usize, parameter: &Tensor, relay: &Tensor) -> Result<Option<Tensor>> {
        let gradient = self.lock().get_mut(&thread::current().id()).and_then(|all| all.get_mut(number)?.take());
        match gradient {
            Some(gradient) => give(parameter, relay, gradient),
            None => bail!("relay: expected a gradient of parameter {number}, got none"),
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<ThreadId, Vec<Option<Tensor>>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A relay of these parameters, and the place where their gradients are left. A parameter that wants no gradient is no part of the
/// chain.
fn relay(parameters: &[Tensor]) -> Result<(Tensor, Gradients)> {
    let gradients = Gradients::default();
    let mut relay = Tensor::zeros(1, DType::F32, &Device::Cpu)?;
    let wanted: Vec<_> = parameters.iter().enumerate().filter(|(_, parameter)| parameter.track_op()).collect();
    for pair in wanted.chunks(2) {
        let link = |numbers| Link { numbers, gradients: gradients.clone() };
        relay = match *pair {
            [(i, a), (j, b)] => a.apply_op3(b, &relay, link([i, j]))?,
            [(i, a)] => a.apply_op2(&relay, link([i, i]))?,
            _ => relay,
        };
    }
    Ok((relay, gradients))
}

/// A layer on the CPU: a function of one tensor, and of parameters whose gradients go through a relay.
pub(crate) trait Layer: Send + Sync + 'static {
    /// The operation's name in candle's errors.
    const NAME: &'static str;

    /// The numbers and the shape of the result.
    fn forward<E: Dtype>(&self, x: &[E], dims: &[usize]) -> Result<(Vec<E>, Shape)>;

    /// The gradient of x, which is there if it is wanted, and those of the parameters, each only if it is wanted.
    fn backward<E: Dtype>(&self, x: &[E], dims: &[usize], grad: &[E], wants_x: bool) -> Result<LayerGradients<E>>;
}

/// Applies a layer with these parameters, which stand in the order of their gradients. `x` is copied if it isn't contiguous.
pub(crate) fn apply<L: Layer>(layer: L, x: &Tensor, parameters: &[Tensor]) -> Result<Tensor> {
    let x = memory::contiguous("input of a layer", x)?;
    let (relay, gradients) = relay(parameters)?;
    x.apply_op2(&relay, Relayed { layer, gradients })
}

struct Relayed<L> {
    layer: L,
    gradients: Gradients,
}

impl<L: Layer> CustomOp2 for Relayed<L> {
    fn name(&self) -> &'static str {
        L::NAME
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        with_dtype!(x.dtype(), E => {
            let (numbers, shape) = self.layer.forward::<E>(slice(x, layout)?, layout.dims())?;
            Ok((E::to_cpu_storage_owned(numbers), shape))
        })
    }

    fn bwd(
        &self,
        x: &Tensor,
        relay: &Tensor,
        result: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let grad = memory::contiguous("gradient of a layer", &grad.detach())?;
        let (detached, wants_x) = (x.detach(), x.track_op());
        let (x_read, grad_read) = (Reading::new(&detached), Reading::new(&grad));
        let of_x = with_dtype!(x.dtype(), E => {
            let grad = grad_read.numbers::<E>()?;
            let (of_x, gradients) = self.layer.backward::<E>(x_read.numbers()?, x.dims(), grad, wants_x)?;
            self.gradients.leave(gradients);
            of_x.filter(|_| wants_x).map(|of_x| tensor(of_x, x.shape())).transpose()
        })?;
        let of_x = of_x.map(|of_x| give(x, result, of_x)).transpose()?.flatten();
        Ok((of_x, of_relay(relay)?))
    }
}

/// One or two parameters, and the relay of those before them.
struct Link {
    /// The numbers of its parameters.
    numbers: [usize; 2],
    gradients: Gradients,
}

const NAME: &str = "relay";

fn one_number() -> Result<(CpuStorage, Shape)> {
    Ok((CpuStorage::F32(vec![0.0]), Shape::from(1)))
}

/// The gradient of a relay, on which nothing depends. It goes nowhere if the relay is a constant.
fn of_relay(before: &Tensor) -> Result<Option<Tensor>> {
    before.track_op().then(|| before.zeros_like()).transpose()
}

impl CustomOp2 for Link {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        one_number()
    }

    fn bwd(&self, a: &Tensor, before: &Tensor, relay: &Tensor, _: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        Ok((self.gradients.take(self.numbers[0], a, relay)?, of_relay(before)?))
    }
}

impl CustomOp3 for Link {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        one_number()
    }

    fn bwd(
        &self,
        a: &Tensor,
        b: &Tensor,
        before: &Tensor,
        relay: &Tensor,
        _: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let [first, second] = self.numbers;
        let [a, b] = [(first, a), (second, b)].map(|(number, parameter)| self.gradients.take(number, parameter, relay));
        Ok((a?, b?, of_relay(before)?))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{CustomOp1, Var};

    use super::*;

    /// The sum of many parameters, each times its number.
    struct WeightedSum {
        parameters: Vec<Tensor>,
        gradients: Gradients,
    }

    impl CustomOp1 for WeightedSum {
        fn name(&self) -> &'static str {
            "weighted-sum"
        }

        fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
            let all = self.parameters.iter().zip(1..);
            let sum = all.map(|(x, n)| Ok(x.to_dtype(DType::F64)?.sum_all()?.to_scalar::<f64>()? * f64::from(n)));
            Ok((CpuStorage::F64(vec![sum.sum::<Result<f64>>()?]), Shape::from(1)))
        }

        fn bwd(&self, relay: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
            let grad = grad.detach().to_vec1::<f64>()?[0];
            let of = |(n, x): (usize, &Tensor)| x.track_op().then(|| x.ones_like()?.affine((n + 1) as f64 * grad, 0.0));
            self.gradients.leave(self.parameters.iter().enumerate().map(|x| of(x).transpose()).collect::<Result<_>>()?);
            of_relay(relay)
        }
    }

    #[test]
    fn each_parameter_gets_its_own_gradient_in_every_backward_pass() -> Result<()> {
        for count in 1..=5 {
            let vars: Vec<_> =
                (0..count).map(|n| Var::zeros((n + 1, 2), DType::F32, &Device::Cpu)).collect::<Result<_>>()?;
            let mut parameters: Vec<_> = vars.iter().map(|var| var.as_tensor().clone()).collect();
            parameters.insert(count / 2, Tensor::ones(3, DType::F64, &Device::Cpu)?);
            let (relay, gradients) = relay(&parameters)?;
            let sum = relay.apply_op1(WeightedSum { parameters: parameters.clone(), gradients })?;
            // Twice, since a graph may be gone through again; the second time with another gradient.
            for factor in [1.0, 3.0] {
                let grads = sum.affine(factor, 0.0)?.backward()?;
                for (n, parameter) in parameters.iter().enumerate().filter(|(_, x)| x.track_op()) {
                    let grad = grads.get(parameter).expect("a gradient").flatten_all()?.to_vec1::<f32>()?;
                    assert_eq!(grad, vec![(n + 1) as f32 * factor as f32; parameter.elem_count()]);
                }
            }
        }
        Ok(())
    }

    #[test]
    fn relay_of_constants_is_a_constant() -> Result<()> {
        let (relay, _) = relay(&[Tensor::ones(3, DType::F64, &Device::Cpu)?])?;
        assert!(!relay.track_op());
        Ok(())
    }
}
