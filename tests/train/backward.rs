//! The backward pass that collects gradients: candle's gradients, whatever the graph.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;

use candle_attention::block::{
    CrossEntropyOptions, Embedding, TransformerBlock, add_dropped, cross_entropy, layer_norm, linear,
    linear_cross_entropy, rms_norm, squared_relu, swiglu,
};
use candle_attention::train::backward;
use candle_attention::{AttentionOptions, Result, SelfAttentionConfig, scaled_dot_product_attention};
use candle_core::{CpuStorage, CustomOp1, DType, Device, Layout, Shape, Tensor, Var};

use crate::blocks::{block, grid};
use crate::common::{assert_close, numbers, randn, var};
use crate::layers::self_attention;

/// All numbers are equal, and both passes have a gradient of every variable.
#[track_caller]
fn assert_candles_gradients(vars: &[Var], loss: &Tensor, what: &str) {
    let (ours, candles) = (backward(loss).unwrap(), loss.backward().unwrap());
    for (number, var) in vars.iter().enumerate() {
        let [ours, candles] = [&ours, &candles].map(|grads| grads.get(var).expect("a gradient of every variable"));
        assert_eq!((ours.dims(), ours.dtype()), (candles.dims(), candles.dtype()), "{what}: variable {number}");
        assert_eq!(numbers(ours).unwrap(), numbers(candles).unwrap(), "{what}: variable {number}");
        assert!(ours.is_contiguous() && !ours.track_op(), "{what}: variable {number}");
    }
}

#[test]
fn blocks_have_candles_gradients() -> Result<()> {
    for dtype in [DType::F32, DType::BF16, DType::F64] {
        for (name, config) in grid() {
            for recompute in [false, true] {
                let block: TransformerBlock = block(&config, dtype)?.with_recompute(recompute);
                let x = var(1, (2, 4, config.attention.embed_dim), dtype)?;
                let loss = block.forward_t(&x, true)?.to_dtype(DType::F32)?.sqr()?.sum_all()?;
                let mut vars = block.vars();
                vars.push(x);
                assert_candles_gradients(&vars, &loss, &format!("{name}, {dtype:?}, recompute {recompute}"));
            }
        }
    }
    Ok(())
}

/// Every kind of operation, with variables as its inputs.
#[test]
fn operations_on_variables_have_candles_gradients() -> Result<()> {
    let dtype = DType::F32;
    let (x, y, weight, bias) =
        (var(1, (6, 8), dtype)?, var(2, (6, 8), dtype)?, var(3, (8, 8), dtype)?, var(4, 8, dtype)?);
    let labels = Tensor::new(&[0u32, 1, 2, 3, 4, 5], &Device::Cpu)?;
    let options = CrossEntropyOptions::default();
    let losses = [
        ("linear", linear(&x, &weight, Some(&bias))?),
        ("rms_norm", rms_norm(&x, &bias, 1e-5)?),
        ("layer_norm", layer_norm(&x, &bias, Some(&bias), 1e-5)?),
        ("activation", squared_relu(&x)?),
        ("gated", swiglu(&x, &y)?),
        ("add_dropped", add_dropped(&x, &y, 0.3, 7)?),
        // The gradient that comes in is that of both.
        ("sum", add_dropped(&x, &y, 0.0, 7)?),
        ("sum of one variable", add_dropped(&x, &x, 0.3, 7)?),
        ("embedding", Embedding::new(weight.as_tensor().clone())?.forward(&labels)?),
        ("cross_entropy", cross_entropy(&x, &labels, &options)?),
        ("linear_cross_entropy", linear_cross_entropy(&x, &weight, None, &labels, &options)?),
    ];
    for (name, result) in losses {
        let loss = result.sqr()?.sum_all()?;
        let candles = loss.backward()?;
        let used = [&x, &y, &weight, &bias].into_iter().filter(|var| candles.get(var).is_some());
        let used: Vec<Var> = used.cloned().collect();
        assert!(!used.is_empty(), "{name}");
        assert_candles_gradients(&used, &loss, name);
    }

    let heads = [1, 2, 3].map(|seed| var(seed, (1, 2, 5, 4), dtype));
    let [q, k, v] = heads;
    let (q, k, v, bias) = (q?, k?, v?, var(4, (5, 5), dtype)?);
    let plain = scaled_dot_product_attention(&q, &k, &v, &AttentionOptions::default())?.context;
    assert_candles_gradients(&[q.clone(), k.clone(), v.clone()], &plain.sqr()?.sum_all()?, "attention");
    let of_one = scaled_dot_product_attention(&q, &q, &q, &AttentionOptions::default())?.context;
    assert_candles_gradients(std::slice::from_ref(&q), &of_one.sqr()?.sum_all()?, "attention of one variable");
    let options = AttentionOptions { attn_bias: Some(bias.as_tensor().clone()), ..Default::default() };
    let biased = scaled_dot_product_attention(&q, &k, &v, &options)?.context;
    assert_candles_gradients(&[q.clone(), k, v, bias], &biased.sqr()?.sum_all()?, "attention with a bias");
    let rotary = SelfAttentionConfig { rotary: Some(Default::default()), ..SelfAttentionConfig::new(8, 2) };
    let layer = self_attention(&rotary, dtype)?;
    let x = var(1, (1, 5, 8), dtype)?;
    let loss = layer.forward(&x)?.sqr()?.sum_all()?;
    assert_candles_gradients(&[layer.vars(), vec![x]].concat(), &loss, "layer with rotary embedding");
    Ok(())
}

/// candle would have added it to zero.
#[test]
fn a_gradient_is_not_added_to_zeros() -> Result<()> {
    let x = Var::new(&[0f32, 2.0], &Device::Cpu)?;
    let loss = squared_relu(&x)?.neg()?.sum_all()?;
    let gradient = |grads: candle_core::backprop::GradStore| grads.get(&x).unwrap().to_vec1::<f32>().unwrap();
    let (ours, candles) = (gradient(backward(&loss)?), gradient(loss.backward()?));
    assert_eq!(ours, [0.0, -4.0]);
    assert!(ours[0].is_sign_negative() && candles[0].is_sign_positive());
    Ok(())
}

/// One weight as an embedding, a head, and in an operation of candle.
#[test]
fn gradients_of_a_variable_that_is_used_several_times_are_summed() -> Result<()> {
    for (dtype, tolerance) in [(DType::F32, 1e-6), (DType::F64, 1e-14), (DType::BF16, 0.02)] {
        let weight = var(1, (6, 4), dtype)?;
        let ids = Tensor::new(&[0u32, 3, 3, 5], &Device::Cpu)?;
        let x = Embedding::new(weight.as_tensor().clone())?.forward(&ids)?;
        let x = linear(&linear(&x, &weight, None)?, &weight.t()?.contiguous()?, None)?;
        let loss = (linear_cross_entropy(&x, &weight, None, &ids, &Default::default())? + weight.sqr()?.mean_all()?)?;
        let (ours, candles) = (backward(&loss)?, loss.backward()?);
        assert_close(ours.get(&weight).unwrap(), candles.get(&weight).unwrap(), tolerance, "a weight used four times");
    }
    Ok(())
}

/// How an operation goes back through a graph of its own.
#[derive(Clone, Copy, Debug)]
enum Inner {
    Candle,
    Collecting,
    Fails,
    Panics,
}

/// When an operation makes its graph.
#[derive(Clone, Copy, Debug)]
enum Made {
    InForward,
    InBackward,
    OnAnotherThread,
}

/// The input, the weight and the result of an operation.
type Graph = (Var, Var, Tensor);

/// y = squared_relu(x · weightᵀ), which candle sees as one operation.
struct OwnGraph {
    weight: Var,
    inner: Inner,
    made: Made,
    kept: Mutex<Option<Graph>>,
}

impl OwnGraph {
    fn new(weight: &Var, inner: Inner, made: Made) -> Self {
        Self { weight: weight.clone(), inner, made, kept: Mutex::new(None) }
    }

    fn graph(&self, x: &Tensor) -> Result<Graph> {
        let (x, weight) = (Var::from_tensor(&x.detach())?, Var::from_tensor(&self.weight)?);
        let y = squared_relu(&linear(&x, &weight, None)?)?;
        Ok((x, weight, y))
    }
}

impl CustomOp1 for OwnGraph {
    fn name(&self) -> &'static str {
        "own-graph"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let x = Tensor::from_slice(storage.as_slice::<f64>()?, layout.shape(), &Device::Cpu)?;
        let graph = self.graph(&x).map_err(candle_core::Error::wrap)?;
        let (numbers, shape) = (graph.2.flatten_all()?.to_vec1()?, graph.2.shape().clone());
        *self.kept.lock().unwrap() = Some(graph);
        Ok((CpuStorage::F64(numbers), shape))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, grad: &Tensor) -> candle_core::Result<Option<Tensor>> {
        let (x, weight, y) = match self.made {
            Made::InForward => self.kept.lock().unwrap().clone().expect("a forward pass"),
            Made::InBackward => self.graph(x).map_err(candle_core::Error::wrap)?,
            Made::OnAnotherThread => {
                let graph = std::thread::scope(|scope| scope.spawn(|| self.graph(x)).join().unwrap());
                graph.map_err(candle_core::Error::wrap)?
            }
        };
        let loss = (y * grad)?.sum_all()?;
        let pass = || match self.inner {
            Inner::Candle => loss.backward(),
            Inner::Collecting => backward(&loss).map_err(candle_core::Error::wrap),
            Inner::Fails => candle_core::bail!("no gradient today"),
            Inner::Panics => panic!("an operation that panics"),
        };
        // Twice, as an iterative operation goes through its graph again and again.
        let passes = [pass()?, pass()?];
        assert!(passes.iter().all(|grads| grads.get(&weight).is_some()), "the gradient of its own variable");
        let [once, again] = passes.map(|grads| grads.get(&x).expect("the gradient of its input").clone());
        Ok(Some((once + again)?))
    }
}

#[test]
fn a_pass_inside_an_operation_has_its_own_gradients() -> Result<()> {
    let (weight, x, before) = (var(1, (3, 4), DType::F64)?, var(2, (5, 4), DType::F64)?, var(3, (4, 4), DType::F64)?);
    for inner in [Inner::Candle, Inner::Collecting] {
        for made in [Made::InForward, Made::InBackward, Made::OnAnotherThread] {
            let op = OwnGraph::new(&weight, inner, made);
            let loss = linear(&x, &before, None)?.apply_op1(op)?.sqr()?.sum_all()?;
            assert_candles_gradients(&[x.clone(), before.clone()], &loss, &format!("{inner:?}, {made:?}"));
        }
    }
    Ok(())
}

/// A root that no operation has made.
#[test]
fn a_variable_has_a_gradient_of_ones() -> Result<()> {
    let x = var(1, (2, 3), DType::F32)?;
    assert_candles_gradients(std::slice::from_ref(&x), &x, "a variable");
    assert!(backward(&x.detach())?.get(&x).is_none());
    Ok(())
}

#[test]
fn a_pass_that_fails_leaves_no_trace() -> Result<()> {
    let (weight, x) = (var(1, (4, 4), DType::F64)?, var(2, (5, 4), DType::F64)?);
    let after = linear(&x, &weight, None)?.sqr()?.sum_all()?;
    for inner in [Inner::Fails, Inner::Panics] {
        let op = OwnGraph::new(&weight, inner, Made::InBackward);
        let loss = linear(&x, &weight, None)?.apply_op1(op)?.sum_all()?;
        let result = catch_unwind(AssertUnwindSafe(|| backward(&loss)));
        assert!(!matches!(result, Ok(Ok(_))));
        let grads = after.backward()?;
        assert!(grads.get(&weight).is_some() && grads.get(&x).is_some());
    }
    Ok(())
}

#[test]
fn threads_collect_their_own_gradients() -> Result<()> {
    let weight = var(1, (4, 4), DType::F64)?;
    std::thread::scope(|scope| {
        let threads = [1, 2, 3, 4].map(|seed| {
            let weight = &weight;
            scope.spawn(move || {
                for _ in 0..50 {
                    let x = randn(seed, (5, 4), DType::F64).unwrap();
                    let loss = linear(&x, weight, None).unwrap().sqr().unwrap().sum_all().unwrap();
                    assert_candles_gradients(std::slice::from_ref(weight), &loss, "a thread");
                }
            })
        });
        for thread in threads {
            thread.join().unwrap();
        }
    });
    Ok(())
}
