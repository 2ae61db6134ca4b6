//! Activation functions: gradients of finite differences, extremes, any layout, and errors.

use candle_attention::Result;
use candle_attention::block::{Activation, gated, gated_halves, geglu, gelu, gelu_tanh, silu, squared_relu, swiglu};
use candle_core::{DType, Device, Tensor, Var};

use crate::common::{assert_finite, assert_same_bits, check_gradients, gradients, numbers, randn, var};
use crate::layers::assert_error_says;

const ALL: [Activation; 5] =
    [Activation::Relu, Activation::SquaredRelu, Activation::Gelu, Activation::GeluTanh, Activation::Silu];
const DTYPES: [DType; 4] = [DType::F16, DType::BF16, DType::F32, DType::F64];

#[test]
fn gradients_of_activations_are_those_of_finite_differences() -> Result<()> {
    let (x, up, halves) = (var(1, (3, 21), DType::F64)?, var(2, (3, 21), DType::F64)?, var(3, (3, 10), DType::F64)?);
    for activation in ALL {
        let what = format!("{activation:?}");
        check_gradients(&[("x", &x)], || activation.forward(&x)?.sin(), 1e-8, &what);
        let both = [("gate", &x), ("up", &up)];
        check_gradients(&both, || gated(activation, &x, &up)?.sin(), 1e-8, &what);
        check_gradients(&[("halves", &halves)], || gated_halves(activation, &halves)?.sin(), 1e-8, &what);
    }
    Ok(())
}

#[test]
fn functions_are_activations_by_name() -> Result<()> {
    let (x, up) = (randn(1, (4, 5), DType::F32)?, randn(2, (4, 5), DType::F32)?);
    let named =
        [(Activation::SquaredRelu, squared_relu(&x)?), (Activation::Gelu, gelu(&x)?), (Activation::Silu, silu(&x)?)];
    for (activation, y) in named.into_iter().chain([(Activation::GeluTanh, gelu_tanh(&x)?)]) {
        assert_same_bits(&y, &activation.forward(&x)?, "named function");
    }
    assert_same_bits(&swiglu(&x, &up)?, &gated(Activation::Silu, &x, &up)?, "SwiGLU");
    assert_same_bits(&geglu(&x, &up)?, &gated(Activation::Gelu, &x, &up)?, "GEGLU");
    Ok(())
}

#[test]
fn names_in_a_config_are_snake_case() {
    for (activation, name) in ALL.iter().zip(["relu", "squared_relu", "gelu", "gelu_tanh", "silu"]) {
        assert_eq!(serde_json::to_string(activation).unwrap(), format!("\"{name}\""));
        assert_eq!(serde_json::from_str::<Activation>(&format!("\"{name}\"")).unwrap(), *activation);
    }
}

/// Views with strides, an offset, or a row that is repeated.
#[test]
fn strided_input_gives_what_its_copy_gives() -> Result<()> {
    for dtype in DTYPES {
        let x = randn(1, (6, 8), dtype)?;
        let views = [x.t()?, x.narrow(1, 2, 4)?, x.narrow(0, 2, 3)?, x.get(1)?.broadcast_as((3, 8))?];
        for view in views {
            let copy = view.force_contiguous()?;
            for activation in ALL {
                assert_same_bits(&activation.forward(&view)?, &activation.forward(&copy)?, "plain");
                assert_same_bits(&gated(activation, &view, &copy)?, &gated(activation, &copy, &copy)?, "gated");
                if view.dims()[1] % 2 == 0 {
                    assert_same_bits(&gated_halves(activation, &view)?, &gated_halves(activation, &copy)?, "halves");
                }
            }
        }
    }
    Ok(())
}

#[test]
fn extremes_have_finite_values_and_gradients() -> Result<()> {
    for dtype in DTYPES {
        let largest = if dtype == DType::F16 { 6e4 } else { 1e30 };
        let x = [0.0, 1e-30, 12.0, 90.0, 1e4, largest].map(|x| [x, -x]).concat();
        let x = candle_core::Var::from_tensor(&Tensor::new(x, &Device::Cpu)?.to_dtype(dtype)?)?;
        for activation in ALL.into_iter().filter(|&activation| activation != Activation::SquaredRelu) {
            let y = activation.forward(&x)?;
            assert_finite(&y, "value");
            assert_finite(&gradients(&y.sum_all()?, &[&x])?[0], "gradient");
            assert_eq!(numbers(&y)?.last(), Some(&0.0), "{activation:?} of the lowest number");
        }
    }
    Ok(())
}

#[test]
fn activations_have_the_same_bits_for_one_thread_and_two() -> Result<()> {
    let (x, up) = (var(1, (500, 301), DType::F32)?, var(2, (500, 301), DType::F32)?);
    let with = |threads: usize| -> Vec<Tensor> {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let run = |activation| -> Result<Vec<Tensor>> {
            let y = gated(activation, &x, &up)?;
            Ok([vec![y.clone()], gradients(&y.sqr()?.sum_all()?, &[&x, &up])?].concat())
        };
        ALL.into_iter().flat_map(|activation| pool.install(|| run(activation)).unwrap()).collect()
    };
    for (one, two) in with(1).iter().zip(&with(2)) {
        assert_same_bits(one, two, "output or gradient");
    }
    Ok(())
}

#[test]
fn empty_input_has_empty_output_and_gradient() -> Result<()> {
    let x = var(1, (3, 0, 4), DType::F32)?;
    for activation in ALL {
        for (y, dims) in [
            (activation.forward(&x)?, [3, 0, 4]),
            (gated(activation, &x, &x)?, [3, 0, 4]),
            (gated_halves(activation, &x)?, [3, 0, 2]),
        ] {
            assert_eq!(y.dims(), dims);
            gradients(&y.sum_all()?, &[&x])?;
        }
    }
    Ok(())
}

#[test]
fn integers_are_refused() -> Result<()> {
    let integers = Tensor::zeros((2, 4), DType::U32, &Device::Cpu)?;
    assert_error_says(gelu(&integers), &["x", "F16, BF16, F32 or F64", "U32"]);
    assert_error_says(swiglu(&integers, &integers), &["gate", "F16, BF16, F32 or F64", "U32"]);
    assert_error_says(gated_halves(Activation::Silu, &integers), &["gate_up", "U32"]);
    Ok(())
}

#[test]
fn gate_and_up_of_two_shapes_are_refused() -> Result<()> {
    let (gate, up) = (randn(1, (2, 4), DType::F32)?, randn(1, (2, 5), DType::F32)?);
    assert_error_says(swiglu(&gate, &up), &["up", "[2, 4], as gate has", "[2, 5]"]);
    Ok(())
}

#[test]
fn gate_and_up_of_two_dtypes_are_refused() -> Result<()> {
    let gate = randn(1, (2, 4), DType::F32)?;
    assert_error_says(swiglu(&gate, &gate.to_dtype(DType::F16)?), &["up", "F32, as gate has", "F16"]);
    Ok(())
}

#[test]
fn halves_of_an_odd_axis_or_of_no_axis_are_refused() -> Result<()> {
    for dims in [&[2, 5][..], &[]] {
        let x = randn(1, dims, DType::F32)?;
        assert_error_says(gated_halves(Activation::Silu, &x), &["gate_up", "(..., 2 * n)"]);
    }
    Ok(())
}

/// Infinity times zero would be NaN.
#[test]
fn no_activation_gives_nan_out_of_a_finite_number_and_zero() -> Result<()> {
    for activation in ALL {
        for dtype in [DType::BF16, DType::F32, DType::F64] {
            let largest = if dtype == DType::F64 { f64::MAX } else { 3e38 };
            let x = Var::from_tensor(&Tensor::new(&[largest, -largest, 1e20], &Device::Cpu)?.to_dtype(dtype)?)?;
            assert_finite(&gated(activation, &x, &x.zeros_like()?)?, "gated by zero");
            let nothing = (activation.forward(&x)? * x.zeros_like()?)?.sum_all()?;
            assert_finite(&gradients(&nothing, &[&x])?[0], "gradient of nothing");
        }
    }
    Ok(())
}
