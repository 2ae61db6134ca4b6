//! Attention itself: every mask and option, in every dtype and layout, with gradients.

use candle_attention::{AttentionOptions, Backend, Result, scaled_dot_product_attention};
use candle_core::{DType, Device};

use crate::check::{check, tolerance};
use crate::common::assert_close;
use crate::gpu;
use crate::masks;
use crate::pairwise::pairwise;
use crate::problem::{Bias, Case, Inputs, Memory, Sizes, error};

const DTYPES: [DType; 4] = [DType::F32, DType::F64, DType::F16, DType::BF16];
const HEADS: [(usize, usize); 4] = [(1, 1), (4, 2), (6, 2), (8, 1)];
/// Pairs of head_dim and value_dim.
const DIMS: [(usize, usize); 6] = [(1, 1), (8, 24), (64, 64), (59, 128), (128, 40), (256, 256)];
const QUERIES: [usize; 5] = [1, 9, 33, 150, 300];
const KEYS: [usize; 5] = [1, 15, 97, 211, 400];
const MEMORY: [Memory; 6] =
    [Memory::Contiguous, Memory::ByToken, Memory::Narrow, Memory::SharedBatch, Memory::SharedHead, Memory::ByColumn];
const BIASES: [Option<Bias>; 6] = [
    None,
    Some(Bias::Constant("bhqk")),
    Some(Bias::Constant("hq")),
    Some(Bias::Trained("bhqk")),
    Some(Bias::Trained("hqk")),
    Some(Bias::Trained("bk")),
];
const SOFTCAPS: [Option<f64>; 2] = [None, Some(1.5)];
const DROPOUTS: [f64; 2] = [0.0, 0.3];

/// Cases that contain every pair of properties.
pub fn cases() -> Vec<(Case, DType)> {
    let masks = masks::all();
    let axes = [
        DTYPES.len(),
        masks.len(),
        HEADS.len(),
        DIMS.len(),
        QUERIES.len(),
        KEYS.len(),
        MEMORY.len(),
        MEMORY.len(),
        BIASES.len(),
        SOFTCAPS.len(),
        DROPOUTS.len(),
        2,
        2,
        2,
    ];
    let case = |at: Vec<usize>| {
        let ((heads, kv_heads), (dim, value_dim)) = (HEADS[at[2]], DIMS[at[3]]);
        let sizes = Sizes { batch: 2, heads, kv_heads, q_len: QUERIES[at[4]], kv_len: KEYS[at[5]], dim, value_dim };
        let case = Case {
            memory: [MEMORY[at[6]], MEMORY[at[7]], MEMORY[at[7]]],
            mask: masks[at[1]].clone(),
            bias: BIASES[at[8]],
            softcap: SOFTCAPS[at[9]],
            dropout_p: DROPOUTS[at[10]],
            alibi: at[11] == 1,
            sinks: at[12] == 1,
            logsumexp: at[13] == 1,
            ..Case::plain(sizes)
        };
        (case, DTYPES[at[0]])
    };
    pairwise(&axes, |_| true).into_iter().map(case).collect()
}

#[test]
fn every_pair_of_properties_equals_the_cpu() -> Result<()> {
    let Some(gpu) = gpu() else { return Ok(()) };
    for (case, dtype) in cases() {
        check(&case, dtype, (Backend::Auto, &gpu), |_| tolerance(dtype))?;
    }
    Ok(())
}

/// This crate's own kernels, which serve all dtypes but f64.
#[test]
fn every_pair_of_properties_by_the_kernels_equals_the_cpu() -> Result<()> {
    let Some(gpu) = gpu() else { return Ok(()) };
    for (case, dtype) in cases().into_iter().filter(|(_, dtype)| *dtype != DType::F64) {
        let case = Case { train_slopes: case.alibi && gpu.is_cuda(), ..case };
        check(&case, dtype, (Backend::Fused, &gpu), |_| tolerance(dtype))?;
    }
    Ok(())
}

/// Sizes of zero, for which candle launches kernels that CUDA refuses.
#[test]
fn nothing_is_nothing_on_a_gpu_too() -> Result<()> {
    let Some(gpu) = gpu() else { return Ok(()) };
    let sizes = Sizes { batch: 2, heads: 4, kv_heads: 2, q_len: 3, kv_len: 5, dim: 4, value_dim: 6 };
    let empty = [
        Sizes { batch: 0, ..sizes },
        Sizes { heads: 0, ..sizes },
        Sizes { q_len: 0, ..sizes },
        Sizes { kv_len: 0, ..sizes },
        Sizes { value_dim: 0, ..sizes },
    ];
    for sizes in empty {
        for dtype in DTYPES {
            let case = Case::plain(sizes);
            let inputs = case.inputs(dtype)?;
            let attend = |inputs: &Inputs| {
                let [q, k, v] = case.views(inputs)?;
                let options = AttentionOptions { return_weights: true, ..case.options(inputs, Backend::Auto)? };
                let output = scaled_dot_product_attention(&q, &k, &v, &options)?;
                candle_core::Result::Ok([Some(output.context), output.weights, output.logsumexp].map(Option::unwrap))
            };
            for (result, expected) in attend(&inputs.to_device(&gpu)?)?.iter().zip(attend(&inputs)?) {
                assert_close(result, &expected, tolerance(dtype), &format!("{sizes:?}, {dtype:?}"));
                assert_eq!(result.dtype(), expected.dtype(), "{sizes:?}");
            }
        }
    }
    Ok(())
}

/// Scores beyond the range of f32 give the same results as on the CPU.
#[test]
fn huge_inputs_give_what_they_give_on_the_cpu() -> Result<()> {
    let Some(gpu) = gpu() else { return Ok(()) };
    let case = Case::plain(Sizes { batch: 1, heads: 2, kv_heads: 1, q_len: 5, kv_len: 7, dim: 8, value_dim: 8 });
    let mut inputs = case.inputs(DType::F32)?;
    for i in 0..2 {
        inputs.stored[i] = candle_core::Var::from_tensor(&(inputs.stored[i].as_detached_tensor() * 1e25)?)?;
    }
    let run = |device: &Device| case.run(&inputs.to_device(device)?, Backend::Auto);
    for ((name, gpu), (_, cpu)) in run(&gpu)?.iter().zip(&run(&Device::Cpu)?) {
        assert!(error(gpu, cpu, 1e-30)? < tolerance(DType::F32), "{name}");
    }
    Ok(())
}
