//! The MLP: its formula, its gradients, shapes, dtypes and errors.

use candle_attention::Result;
use candle_attention::block::{Activation, Mlp, MlpConfig};
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{Module, VarBuilder, VarMap};

use crate::common::{
    assert_close, assert_same_bits, check_gradients, gradients, max_abs_difference, numbers, randn, var,
};
use crate::layers::assert_error_says;

const ACTIVATIONS: [Activation; 5] =
    [Activation::Relu, Activation::SquaredRelu, Activation::Gelu, Activation::GeluTanh, Activation::Silu];

/// Every activation, gated or not, with and without biases: tokens of 6, hidden sizes of 5.
fn configs() -> Vec<MlpConfig> {
    let mut configs = Vec::new();
    for activation in ACTIVATIONS {
        for gated in [false, true] {
            for bias in [false, true] {
                configs.push(MlpConfig { activation, gated, bias, ..MlpConfig::new(6, 5) });
            }
        }
    }
    configs
}

/// An MLP on a `VarMap` of its own, whose parameters are all random, and its variables.
fn mlp(config: &MlpConfig, dtype: DType) -> Result<(Mlp, Vec<Var>)> {
    let mlp = Mlp::new(config, VarBuilder::from_varmap(&VarMap::new(), dtype, &Device::Cpu))?;
    let vars = mlp.parameters().into_iter().map(|(_, tensor)| Var::from_tensor(tensor));
    let vars = vars.collect::<candle_core::Result<Vec<_>>>()?;
    for (var, seed) in vars.iter().zip(1000..) {
        let inputs = if var.rank() == 2 { var.dim(1)? } else { 4 };
        let numbers = randn(seed, var.shape(), DType::F64)?.affine((inputs as f64).powf(-0.5), 0.0)?;
        var.set(&numbers.to_dtype(dtype)?)?;
    }
    Ok((mlp, vars))
}

/// The formula, by candle's operations.
fn formula(mlp: &Mlp, x: &Tensor) -> Result<Tensor> {
    let f = |x: Tensor| match mlp.config().activation {
        Activation::Relu => x.relu(),
        Activation::SquaredRelu => x.relu()?.sqr(),
        Activation::Gelu => x.gelu_erf(),
        Activation::GeluTanh => x.gelu(),
        _ => x.silu(),
    };
    let hidden = match mlp.gate() {
        Some(gate) => (f(gate.forward(x)?)? * mlp.up().forward(x)?)?,
        None => f(mlp.up().forward(x)?)?,
    };
    Ok(mlp.down().forward(&hidden)?)
}

/// The output, and the gradients of x and of every parameter for the loss Σ y · c with random numbers c.
fn run(mlp: &Mlp, vars: &[Var], x: &Var) -> candle_core::Result<Vec<Tensor>> {
    let y = mlp.forward(x)?;
    let loss = (&y * randn(9, y.shape(), DType::F64)?.to_dtype(y.dtype())?)?;
    let gradients = gradients(&loss, &[x].into_iter().chain(vars).collect::<Vec<_>>())?;
    Ok([vec![y], gradients].concat())
}

#[test]
fn mlp_is_its_formula() -> Result<()> {
    for config in configs() {
        let (mlp, _) = mlp(&config, DType::F64)?;
        let x = randn(1, (2, 4, 6), DType::F64)?;
        assert_close(&mlp.forward(&x)?, &formula(&mlp, &x)?, 1e-12, &format!("{config:?}"));
    }
    Ok(())
}

#[test]
fn gradients_are_those_of_finite_differences() -> Result<()> {
    for config in configs() {
        let ((mlp, vars), x) = (mlp(&config, DType::F64)?, var(1, (2, 4, 6), DType::F64)?);
        let c = randn(9, (2, 4, 6), DType::F64)?;
        let mut all: Vec<(&str, &Var)> = mlp.parameters().into_iter().map(|(name, _)| name).zip(&vars).collect();
        all.push(("x", &x));
        check_gradients(&all, || mlp.forward(&x)? * &c, 1e-8, &format!("{config:?}"));
    }
    Ok(())
}

#[test]
fn input_of_any_shape_keeps_it() -> Result<()> {
    for config in configs() {
        let (mlp, _) = mlp(&config, DType::F32)?;
        for dims in [vec![6], vec![1, 6], vec![2, 3, 2, 6], vec![0, 6], vec![2, 0, 6]] {
            let x = randn(1, dims.as_slice(), DType::F32)?;
            let y = mlp.forward(&x)?;
            assert_eq!(y.dims(), dims);
            assert_close(&y, &formula(&mlp, &x.reshape(((), 6))?)?.reshape(dims)?, 1e-5, &format!("{config:?}"));
        }
        let x = randn(1, (4, 3, 6), DType::F32)?.transpose(0, 1)?;
        assert_same_bits(&mlp.forward(&x)?, &mlp.forward(&x.contiguous()?)?, "strides");
    }
    Ok(())
}

/// By how many times the rounding of one number the numbers of an MLP may differ, relative to the largest of their tensor. What goes
/// into the activation is rounded, and the square of ReLU doubles that.
const ROUNDOFFS: f64 = 10.0;

#[test]
fn half_types_are_near_f64() -> Result<()> {
    let mut worst = 0f64;
    for (dtype, roundoff) in [(DType::F16, 1.0 / 2048.0), (DType::BF16, 1.0 / 256.0)] {
        for config in configs() {
            let ((half, half_vars), (wide, wide_vars)) = (mlp(&config, dtype)?, mlp(&config, DType::F64)?);
            for (half, wide) in half_vars.iter().zip(&wide_vars) {
                wide.set(&half.to_dtype(DType::F64)?)?;
            }
            let x = randn(1, (2, 9, 6), dtype)?;
            let found = run(&half, &half_vars, &Var::from_tensor(&x)?)?;
            let expected = run(&wide, &wide_vars, &Var::from_tensor(&x.to_dtype(DType::F64)?)?)?;
            for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
                let largest = numbers(expected)?.into_iter().fold(0f64, |largest, x| largest.max(x.abs()));
                let difference = max_abs_difference(found, expected)? / largest / roundoff;
                assert!(difference < ROUNDOFFS, "{dtype:?}, {config:?}, tensor {i}: off by {difference} roundoffs");
                worst = worst.max(difference);
            }
        }
    }
    println!("off by at most {worst} roundoffs");
    Ok(())
}

#[test]
fn numbers_do_not_depend_on_the_number_of_threads() -> Result<()> {
    let with_threads = |threads, f: &(dyn Fn() -> candle_core::Result<Vec<Tensor>> + Sync)| {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool").install(f)
    };
    for gated in [false, true] {
        for dtype in [DType::F32, DType::F64, DType::F16, DType::BF16] {
            let config = MlpConfig { gated, ..MlpConfig::new(72, 300) };
            let ((mlp, vars), x) = (mlp(&config, dtype)?, var(1, (3, 130, 72), dtype)?);
            let one = with_threads(1, &|| run(&mlp, &vars, &x))?;
            for threads in [2, 5] {
                for (many, one) in with_threads(threads, &|| run(&mlp, &vars, &x))?.iter().zip(&one) {
                    assert_same_bits(many, one, &format!("{dtype:?}, gated {gated}, {threads} threads"));
                }
            }
        }
    }
    Ok(())
}

#[test]
fn frozen_parameters_get_no_gradient_and_the_others_the_same() -> Result<()> {
    for config in configs() {
        let ((all, vars), x) = (mlp(&config, DType::F32)?, var(1, (2, 4, 6), DType::F32)?);
        let expected = run(&all, &vars, &x)?;
        for frozen in 0..vars.len() {
            let tensors = all.parameters().into_iter().enumerate().map(|(i, (name, tensor))| {
                (name.to_string(), if i == frozen { tensor.detach() } else { tensor.clone() })
            });
            let mlp = Mlp::new(&config, VarBuilder::from_tensors(tensors.collect(), DType::F32, &Device::Cpu))?;
            let grads = (mlp.forward(&x)? * randn(9, (2, 4, 6), DType::F64)?.to_dtype(DType::F32)?)?.backward()?;
            assert_same_bits(grads.get(&x).expect("a gradient of x"), &expected[1], "x");
            for (i, ((name, tensor), expected)) in mlp.parameters().into_iter().zip(&expected[2..]).enumerate() {
                match grads.get(tensor) {
                    Some(grad) if i != frozen => assert_same_bits(grad, expected, name),
                    None if i == frozen => {}
                    other => panic!("{config:?}, {name}: a gradient is there: {}", other.is_some()),
                }
            }
        }
    }
    Ok(())
}

#[test]
fn new_parameters_depend_on_seed_and_name_alone() -> Result<()> {
    let make = |seed, name: &str| {
        let vb = VarBuilder::from_varmap(&VarMap::new(), DType::F64, &Device::Cpu);
        let mlp = Mlp::new(&MlpConfig { seed, ..MlpConfig::swiglu(6, 5) }, vb.pp(name))?;
        Ok::<_, candle_attention::Error>(mlp.up().weight().clone())
    };
    let first = make(1, "a")?;
    assert_same_bits(&make(1, "a")?, &first, "the same seed and name");
    for other in [make(2, "a")?, make(1, "b")?] {
        assert!(max_abs_difference(&other, &first)? > 1e-3);
    }
    // Xavier: uniform up to sqrt(6 / (6 + 5)).
    assert!(numbers(&first)?.into_iter().all(|x| x.abs() <= (6f64 / 11.0).sqrt()));
    Ok(())
}

#[test]
fn parameters_have_the_names_and_shapes_of_the_config() -> Result<()> {
    let (with_biases, _) = mlp(&MlpConfig::new(6, 5), DType::F32)?;
    let found = with_biases.parameters().into_iter().map(|(name, x)| (name, x.dims().to_vec())).collect::<Vec<_>>();
    let expected: [(_, &[usize]); 4] =
        [("up.weight", &[5, 6]), ("up.bias", &[5]), ("down.weight", &[6, 5]), ("down.bias", &[6])];
    assert_eq!(found, expected.map(|(name, dims)| (name, dims.to_vec())));
    let (gated, _) = mlp(&MlpConfig::swiglu(6, 5), DType::F32)?;
    let names: Vec<&str> = gated.parameters().into_iter().map(|(name, _)| name).collect();
    assert_eq!(names, ["gate.weight", "up.weight", "down.weight"]);
    Ok(())
}

#[test]
fn input_and_config_that_do_not_fit_are_refused() -> Result<()> {
    let (small, _) = mlp(&MlpConfig::new(6, 5), DType::F32)?;
    for dims in [vec![2, 5], vec![], vec![6, 0]] {
        let x = Tensor::zeros(dims.as_slice(), DType::F32, &Device::Cpu)?;
        assert_error_says(small.forward(&x), &["input", "embed_dim 6", &format!("{dims:?}")]);
    }
    assert_error_says(small.forward(&randn(1, (2, 6), DType::F64)?), &["input", "F32", "got F64"]);
    let varmap = VarMap::new();
    for (config, dtype, parts) in [
        (MlpConfig::new(0, 5), DType::F32, ["mlp.embed_dim", "got 0"]),
        (MlpConfig::new(6, 0), DType::F32, ["mlp.hidden_dim", "got 0"]),
        (MlpConfig::new(usize::MAX, 5), DType::F32, ["mlp.embed_dim", "that memory can address"]),
        (MlpConfig::new(6, 5), DType::U32, ["parameters", "U32"]),
    ] {
        assert_error_says(Mlp::new(&config, VarBuilder::from_varmap(&varmap, dtype, &Device::Cpu)), &parts);
    }
    assert!(varmap.all_vars().is_empty());
    let other = VarBuilder::from_tensors(
        [("up.weight".to_string(), randn(1, (5, 7), DType::F32)?)].into(),
        DType::F32,
        &Device::Cpu,
    );
    assert!(Mlp::new(&MlpConfig::new(6, 5), other).is_err());
    Ok(())
}
