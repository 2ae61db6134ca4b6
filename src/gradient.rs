//! Gradients on their way from this crate's operations.
//!
//! candle makes a tensor of zeros for each gradient, and adds the gradient to it, on one thread. For elementwise operations that takes
//! longer than the gradient itself. The gradient of a variable need not go through candle: nothing else of the backward pass
//! depends on it. A *collecting* pass keeps such gradients here, and hands candle none.

use std::cell::RefCell;
use std::collections::HashMap;

use candle_core::backprop::GradStore;
use candle_core::{CpuStorage, D, DType, Device, Result, Storage, Tensor, TensorId};
use half::bf16;

use crate::memory;

/// Variables, each with its gradient so far.
type Collected = HashMap<TensorId, Tensor>;

thread_local! {
    /// What the collecting passes of this thread have collected; the innermost pass is the last.
    static PASSES: RefCell<Vec<Collected>> = const { RefCell::new(Vec::new()) };
}

/// The gradients of everything that `root` depends on, as candle gives them.
///
/// A gradient that several operations contribute to is the sum of those of this crate's operations, in the order of the pass, and then
/// of candle's sum of all others.
pub(crate) fn collecting_backward(root: &Tensor) -> Result<GradStore> {
    let pass = Pass::start();
    let mut gradients = root.backward()?;
    for (id, gradient) in pass.collected() {
        let sum = match gradients.get_id(id) {
            Some(of_candle) => gradient.add(of_candle)?.detach(),
            None => gradient,
        };
        gradients.insert_id(id, sum);
    }
    Ok(gradients)
}

/// A collecting pass. It ends when this is dropped, after an error or a panic too.
struct Pass;

impl Pass {
    fn start() -> Self {
        PASSES.with_borrow_mut(|passes| passes.push(Collected::new()));
        Self
    }

    fn collected(self) -> Collected {
        PASSES.with_borrow_mut(|passes| passes.last_mut().map(std::mem::take)).unwrap_or_default()
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        PASSES.with_borrow_mut(Vec::pop);
    }
}

/// How many collecting passes ran on this thread when an operation was applied.
///
/// An operation's gradient may compute a part of the model again, with a backward pass of its own. If candle runs that pass, candle's
/// result must have all gradients, so what is applied during a pass is collected only by a pass inside it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Depth(usize);

impl Depth {
    pub(crate) fn now() -> Self {
        Self(PASSES.with_borrow(Vec::len))
    }
}

/// Hands over the gradient of an argument of an operation that was applied at `depth`: to the pass that collects it, and otherwise
/// to candle, by the result.
pub(crate) fn give(argument: &Tensor, gradient: Tensor, depth: Depth) -> Result<Option<Tensor>> {
    if !argument.is_variable() || Depth::now().0 <= depth.0 {
        return to_be_added(gradient).map(Some);
    }
    let gradient = gradient.detach();
    PASSES.with_borrow_mut(|passes| {
        let Some(collected) = passes.last_mut() else { return Ok(Some(gradient)) };
        let sum = match collected.get(&argument.id()) {
            Some(sum) => sum.add(&gradient)?.detach(),
            None => gradient,
        };
        collected.insert(argument.id(), sum);
        Ok(None)
    })
}

/// Fewer numbers than this are added in no time, however that is done.
const FEW: usize = 1 << 10;

/// As [`give`], for an argument whose gradient is that of the result. A variable gets a copy, so that no two of them share memory.
pub(crate) fn give_incoming(argument: &Tensor, gradient: &Tensor, depth: Depth) -> Result<Option<Tensor>> {
    let gradient = if argument.is_variable() { gradient.copy()? } else { gradient.clone() };
    give(argument, gradient, depth)
}

/// A gradient that an operation gives to candle, which adds it to a tensor of zeros.
///
/// On x86-64, candle adds contiguous bf16 with instructions that aren't inlined, in 16 ns a number. Where the numbers of one
/// operand are no neighbours it takes plain code, in 2.5 ns a number (measured with candle 0.11.1 on two cores of an Emerald Rapids
/// processor). So a gradient in bf16 has a gap behind each number; the sum has none.
fn to_be_added(gradient: Tensor) -> Result<Tensor> {
    let is_slow = cfg!(target_arch = "x86_64") && gradient.dtype() == DType::BF16 && gradient.device().is_cpu();
    if !is_slow || gradient.rank() == 0 || gradient.elem_count() < FEW || !gradient.is_contiguous() {
        return Ok(gradient);
    }
    memory::ask_for("gradient", 2, &gradient, DType::BF16)?;
    let (storage, layout) = gradient.storage_and_layout();
    let Storage::Cpu(CpuStorage::BF16(numbers)) = &*storage else { return Ok(gradient.clone()) };
    let numbers = &numbers[layout.start_offset()..][..gradient.elem_count()];
    let mut apart = vec![bf16::ZERO; 2 * numbers.len()];
    apart.chunks_exact_mut(2).zip(numbers).for_each(|(to, x)| to[0] = *x);
    let dims = [gradient.dims(), &[2]].concat();
    Tensor::from_vec(apart, dims, &Device::Cpu)?.narrow(D::Minus1, 0, 1)?.squeeze(D::Minus1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gradients_are_what_they_were() -> Result<()> {
        for dtype in [DType::F32, DType::BF16, DType::F16] {
            for dims in [vec![], vec![3], vec![0, 4], vec![8, 16, 32]] {
                let x = Tensor::randn(0f32, 1.0, dims.clone(), &Device::Cpu)?.to_dtype(dtype)?;
                let apart = to_be_added(x.clone())?;
                assert_eq!((apart.dims(), apart.dtype()), (&dims[..], dtype));
                let numbers = |x: &Tensor| x.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>();
                assert_eq!(numbers(&x.zeros_like()?.add(&apart)?)?, numbers(&x)?);
            }
        }
        Ok(())
    }
}
