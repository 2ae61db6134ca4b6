//! Gradients on their way from this crate's operations.
//!
//! candle makes a tensor of zeros for each gradient, and adds the gradient to it, on one thread. For elementwise operations that takes
//! longer than the gradient itself. The gradient of a variable need not go through candle: nothing else of the backward pass
//! depends on it. A *collecting* pass keeps such gradients here, and hands candle none.

use std::cell::RefCell;
use std::collections::{HashMap, HashSet};

use candle_core::backprop::GradStore;
use candle_core::{CpuStorage, D, DType, Device, Result, Storage, Tensor, TensorId};
use half::bf16;

use crate::memory;

/// Fewer numbers than this are added in no time, however that is done.
const FEW: usize = 1 << 10;

/// A collecting pass.
#[derive(Default)]
struct Pass {
    /// The nodes of its graph. An operation may run a backward pass of its own inside this one, through another graph and by candle.
    /// The result of that pass must have all gradients, so none of them is collected here.
    nodes: HashSet<TensorId>,
    /// The gradients of variables so far.
    gradients: HashMap<TensorId, Tensor>,
}

thread_local! {
    /// The passes that run on this thread; the innermost one is the last.
    static PASSES: RefCell<Vec<Pass>> = const { RefCell::new(Vec::new()) };
}

/// The gradients of everything that `root` depends on, as candle gives them.
///
/// A gradient that several operations contribute to is the sum of those of this crate's operations, in the order of the pass, and then
/// of candle's sum of all others.
pub(crate) fn collecting_backward(root: &Tensor) -> Result<GradStore> {
    let running = Running::start(root);
    let mut gradients = root.backward()?;
    for (id, gradient) in running.collected() {
        let sum = match gradients.get_id(id) {
            Some(of_candle) => sum(of_candle, gradient)?,
            None => gradient,
        };
        gradients.insert_id(id, sum);
    }
    Ok(gradients)
}

/// The innermost pass. It ends when this is dropped, after an error or a panic too.
struct Running;

impl Running {
    fn start(root: &Tensor) -> Self {
        let nodes = root.sorted_nodes().into_iter().map(Tensor::id).collect();
        PASSES.with_borrow_mut(|passes| passes.push(Pass { nodes, ..Pass::default() }));
        Self
    }

    fn collected(self) -> HashMap<TensorId, Tensor> {
        PASSES
            .with_borrow_mut(|passes| passes.last_mut().map(|pass| std::mem::take(&mut pass.gradients)))
            .unwrap_or_default()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        PASSES.with_borrow_mut(Vec::pop);
    }
}

fn sum(sum: &Tensor, gradient: Tensor) -> Result<Tensor> {
    memory::ask_for("sum of gradients", 1, sum, sum.dtype())?;
    Ok(sum.add(&to_be_added(gradient)?)?.detach())
}

/// Whether a pass collects the gradient of an operation's argument.
fn is_collected(argument: &Tensor, result: &Tensor) -> bool {
    let is_node = |pass: &Pass| pass.nodes.contains(&result.id());
    argument.is_variable() && PASSES.with_borrow(|passes| passes.last().is_some_and(is_node))
}

/// Hands over the gradient of an argument of the operation that made `result`: to the pass that collects it, and otherwise to candle, by
/// this function's result. The gradient shares no memory with another tensor, and is contiguous.
pub(crate) fn give(argument: &Tensor, result: &Tensor, gradient: Tensor) -> Result<Option<Tensor>> {
    if !is_collected(argument, result) {
        return to_be_added(gradient).map(Some);
    }
    let gradient = match PASSES.with_borrow_mut(|passes| passes.last_mut()?.gradients.remove(&argument.id())) {
        Some(before) => sum(&before, gradient)?,
        None => gradient.detach(),
    };
    PASSES.with_borrow_mut(|passes| passes.last_mut().map(|pass| pass.gradients.insert(argument.id(), gradient)));
    Ok(None)
}

/// As [`give`], for an argument whose gradient is that of the result.
pub(crate) fn give_incoming(argument: &Tensor, result: &Tensor, gradient: &Tensor) -> Result<Option<Tensor>> {
    if !is_collected(argument, result) {
        return to_be_added(gradient.clone()).map(Some);
    }
    memory::ask_for("gradient", 1, gradient, gradient.dtype())?;
    give(argument, result, gradient.copy()?)
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
