//! Invalid input gives an error that names what was expected and what was found, never a panic.

use candle_attention::{AttentionError, AttentionOptions, Backend, Error, Mask, scaled_dot_product_attention};
use candle_core::{DType, Device, Tensor};

/// Query (2, 4, 3, 6), key (2, 2, 5, 6), value (2, 2, 5, 7).
const QUERY: [usize; 4] = [2, 4, 3, 6];
const KEY: [usize; 4] = [2, 2, 5, 6];
const VALUE: [usize; 4] = [2, 2, 5, 7];

fn zeros(dims: &[usize], dtype: DType) -> Tensor {
    Tensor::zeros(dims, dtype, &Device::Cpu).unwrap()
}

fn error(inputs: [&Tensor; 3], options: &AttentionOptions) -> AttentionError {
    match scaled_dot_product_attention(inputs[0], inputs[1], inputs[2], options) {
        Err(Error::Attention(error)) => error,
        other => panic!("{other:?}"),
    }
}

/// The error for inputs of these shapes.
fn shapes(query: &[usize], key: &[usize], value: &[usize]) -> AttentionError {
    let [query, key, value] = [query, key, value].map(|dims| zeros(dims, DType::F32));
    error([&query, &key, &value], &AttentionOptions::default())
}

/// The error for inputs of these dtypes.
fn dtypes(dtypes: [DType; 3]) -> AttentionError {
    let inputs = [(QUERY, dtypes[0]), (KEY, dtypes[1]), (VALUE, dtypes[2])];
    let [query, key, value] = inputs.map(|(dims, dtype)| zeros(&dims, dtype));
    error([&query, &key, &value], &AttentionOptions::default())
}

/// The error for valid inputs with these options.
fn options(options: AttentionOptions) -> AttentionError {
    let [query, key, value] = [QUERY, KEY, VALUE].map(|dims| zeros(&dims, DType::F32));
    error([&query, &key, &value], &options)
}

/// One test for each entry: its name, the error, the error's variant, and parts of its text: what was expected, and
/// what was found.
macro_rules! hostile {
    ($($name:ident: $error:expr => $variant:ident, $expected:expr, $got:expr;)*) => {
        $(#[test]
        fn $name() {
            let (error, expected, got): (AttentionError, &str, &str) = ($error, &$expected, &$got);
            assert!(matches!(error, AttentionError::$variant { .. }), "{error:?}");
            let text = error.to_string();
            assert!(text.contains(expected), "{expected:?} is not in {text:?}");
            assert!(text.contains(got), "{got:?} is not in {text:?}");
        })*
    };
}

#[test]
fn what_the_other_tests_spoil_is_good() {
    let [query, key, value] = [QUERY, KEY, VALUE].map(|dims| zeros(&dims, DType::F32));
    let output = scaled_dot_product_attention(&query, &key, &value, &AttentionOptions::default()).unwrap();
    assert_eq!(output.context.dims(), [2, 4, 3, 7]);
}

// Ranks.
hostile! {
    query_without_axes: shapes(&[], &[], &[])
        => Rank, "query: expected 4 axes (batch, num_heads, q_len, head_dim)", "got rank 0 with shape []";
    query_of_one_axis: shapes(&[6], &[6], &[6])
        => Rank, "query: expected 4 axes", "got rank 1 with shape [6]";
    query_of_five_axes: shapes(&[1, 2, 4, 3, 6], &KEY, &VALUE)
        => Rank, "query: expected 4 axes", "got rank 5 with shape [1, 2, 4, 3, 6]";
    key_with_fewer_axes: shapes(&QUERY, &[2, 5, 6], &VALUE)
        => Rank, "key: expected as many axes as query", "got rank 3 with shape [2, 5, 6]";
    value_with_fewer_axes: shapes(&QUERY, &KEY, &[5, 7])
        => Rank, "value: expected as many axes as query", "got rank 2 with shape [5, 7]";
    value_with_more_axes: shapes(&[3, 6], &[5, 6], &[1, 5, 7])
        => Rank, "value: expected as many axes as query", "got rank 3 with shape [1, 5, 7]";
}

// Shapes.
hostile! {
    key_of_another_batch: shapes(&QUERY, &[3, 2, 5, 6], &VALUE)
        => Shape, "key: expected shape (batch, num_kv_heads, kv_len, head_dim) = [2, 2, 5, 6]", "got [3, 2, 5, 6]";
    key_of_another_head_dim: shapes(&QUERY, &[2, 2, 5, 7], &VALUE)
        => Shape, "key: expected shape (batch, num_kv_heads, kv_len, head_dim) = [2, 2, 5, 6]", "got [2, 2, 5, 7]";
    key_of_a_third_batch: shapes(&[1, 4, 3, 6], &[3, 2, 5, 6], &VALUE)
        => Shape, "value: expected shape (batch, num_kv_heads, kv_len, value_dim) = [3, 2, 5, 7]", "got [2, 2, 5, 7]";
    value_of_another_batch: shapes(&QUERY, &KEY, &[3, 2, 5, 7])
        => Shape, "value: expected shape (batch, num_kv_heads, kv_len, value_dim) = [2, 2, 5, 7]", "got [3, 2, 5, 7]";
    value_of_another_length: shapes(&QUERY, &KEY, &[2, 2, 4, 7])
        => Shape, "value: expected shape (batch, num_kv_heads, kv_len, value_dim) = [2, 2, 5, 7]", "got [2, 2, 4, 7]";
    value_of_other_heads: shapes(&QUERY, &KEY, &[2, 4, 5, 7])
        => Shape, "= [2, 2, 5, 7]", "got [2, 4, 5, 7]";
    value_without_keys: shapes(&QUERY, &[2, 2, 0, 6], &VALUE)
        => Shape, "= [2, 2, 0, 7]", "got [2, 2, 5, 7]";
    sequences_of_another_batch: shapes(&[2, 3, 6], &[3, 5, 6], &[3, 5, 7])
        => Shape, "key: expected shape", "got [3, ";
    heads_that_are_no_multiple: shapes(&QUERY, &[2, 3, 5, 6], &[2, 3, 5, 7])
        => Heads, "expected a multiple of num_kv_heads", "got num_heads 4 and num_kv_heads 3";
    more_key_heads_than_query_heads: shapes(&QUERY, &[2, 8, 5, 6], &[2, 8, 5, 7])
        => Heads, "expected a multiple of num_kv_heads", "got num_heads 4 and num_kv_heads 8";
    no_key_heads: shapes(&QUERY, &[2, 0, 5, 6], &[2, 0, 5, 7])
        => Heads, "expected a multiple of num_kv_heads", "got num_heads 4 and num_kv_heads 0";
    no_heads_at_all: shapes(&[2, 0, 3, 6], &[2, 0, 5, 6], &[2, 0, 5, 7])
        => Heads, "expected a multiple of num_kv_heads", "got num_heads 0 and num_kv_heads 0";
    head_dim_of_zero: shapes(&[2, 4, 3, 0], &[2, 2, 5, 0], &VALUE)
        => Shape, "head_dim at least 1", "got [2, 4, 3, 0]";
}

// Dtypes.
hostile! {
    query_of_bytes: dtypes([DType::U8; 3])
        => DType, "query: expected dtype F16, BF16, F32 or F64", "got U8";
    query_of_integers: dtypes([DType::I64; 3])
        => DType, "query: expected dtype F16, BF16, F32 or F64", "got I64";
    query_of_eight_bit_floats: dtypes([DType::F8E4M3; 3])
        => DType, "query: expected dtype F16, BF16, F32 or F64", "got F8E4M3";
    key_of_another_dtype: dtypes([DType::F32, DType::F64, DType::F32])
        => DType, "key: expected dtype F32, that of query", "got F64";
    key_of_integers: dtypes([DType::F32, DType::U32, DType::F32])
        => DType, "key: expected dtype F32, that of query", "got U32";
    value_of_another_dtype: dtypes([DType::BF16, DType::BF16, DType::F16])
        => DType, "value: expected dtype BF16, that of query", "got F16";
}

fn with_scale(scale: f64) -> AttentionOptions {
    AttentionOptions { scale: Some(scale), ..Default::default() }
}

fn with_softcap(softcap: f64) -> AttentionOptions {
    AttentionOptions { softcap: Some(softcap), ..Default::default() }
}

fn with_dropout(dropout_p: f64) -> AttentionOptions {
    AttentionOptions { dropout_p, ..Default::default() }
}

// Numbers.
hostile! {
    scale_beyond_f32: options(with_scale(1e300))
        => Number, "scale: expected a number that F32 can hold", "got 1000000";
    scale_that_is_zero_in_f32: options(with_scale(1e-50))
        => Number, "scale: expected a number that F32 can hold", "got 0.0000000";
    softcap_beyond_f32: options(with_softcap(1e39))
        => Number, "softcap: expected a number that F32 can hold", "got 1000000";
    softcap_that_is_zero_in_f32: options(with_softcap(1e-46))
        => Number, "softcap: expected a number that F32 can hold", "got 0.0000000";
    scale_of_nan: options(with_scale(f64::NAN))
        => Number, "scale: expected a finite number", "got NaN";
    scale_of_infinity: options(with_scale(f64::INFINITY))
        => Number, "scale: expected a finite number", "got inf";
    scale_of_minus_infinity: options(with_scale(f64::NEG_INFINITY))
        => Number, "scale: expected a finite number", "got -inf";
    softcap_below_zero: options(with_softcap(-1.0))
        => Number, "softcap: expected a finite number above 0", "got -1";
    softcap_of_nan: options(with_softcap(f64::NAN))
        => Number, "softcap: expected a finite number above 0", "got NaN";
    softcap_of_infinity: options(with_softcap(f64::INFINITY))
        => Number, "softcap: expected a finite number above 0", "got inf";
    dropout_of_everything: options(with_dropout(1.0))
        => Number, "dropout_p: expected a probability in [0, 1)", "got 1";
    dropout_below_zero: options(with_dropout(-0.1))
        => Number, "dropout_p: expected a probability in [0, 1)", "got -0.1";
    dropout_above_one: options(with_dropout(1.5))
        => Number, "dropout_p: expected a probability in [0, 1)", "got 1.5";
    dropout_of_nan: options(with_dropout(f64::NAN))
        => Number, "dropout_p: expected a probability in [0, 1)", "got NaN";
}

fn with_mask(attn_mask: Mask) -> AttentionOptions {
    AttentionOptions { attn_mask, ..Default::default() }
}

fn with_bias(dims: &[usize], dtype: DType) -> AttentionOptions {
    AttentionOptions { attn_bias: Some(zeros(dims, dtype)), ..Default::default() }
}

fn with_slopes(dims: &[usize], dtype: DType) -> AttentionOptions {
    AttentionOptions { alibi_slopes: Some(zeros(dims, dtype)), ..Default::default() }
}

fn with_sinks(dims: &[usize], dtype: DType) -> AttentionOptions {
    AttentionOptions { sinks: Some(zeros(dims, dtype)), ..Default::default() }
}

/// An f64 tensor of zeros with `number` at the end, which f32 can't hold.
fn beyond_f32(dims: &[usize], number: f64) -> Option<Tensor> {
    let mut numbers = vec![0.0; dims.iter().product()];
    *numbers.last_mut().expect("an entry") = number;
    Some(Tensor::from_vec(numbers, dims, &Device::Cpu).unwrap())
}

hostile! {
    bias_beyond_f32: options(AttentionOptions { attn_bias: beyond_f32(&[3, 5], 1e300), ..Default::default() })
        => Number, "attn_bias: expected numbers that F32, which is computed in, can hold", "got 1000000";
    bias_of_the_lowest_f64: options(AttentionOptions { attn_bias: beyond_f32(&[3, 5], f64::MIN), ..Default::default() })
        => Number, "attn_bias: expected numbers that F32, which is computed in, can hold", "got -1797693";
    slopes_beyond_f32: options(AttentionOptions { alibi_slopes: beyond_f32(&[4], -1e39), ..Default::default() })
        => Number, "alibi_slopes: expected numbers that F32, which is computed in, can hold", "got -1000000";
    sinks_beyond_f32: options(AttentionOptions { sinks: beyond_f32(&[4], 1e300), ..Default::default() })
        => Number, "sinks: expected numbers that F32, which is computed in, can hold", "got 1000000";
}

/// Numbers in a wider dtype than the queries are no error if they can be computed with. Nor is minus infinity.
#[test]
fn numbers_of_a_wider_dtype_that_fit_are_accepted() {
    let lowest_f32 = |numbers: [f64; 2]| Tensor::new(&numbers, &Device::Cpu).unwrap();
    for (dtype, bias) in [
        (DType::F32, lowest_f32([f64::NEG_INFINITY, f64::from(f32::MIN)])),
        (DType::F16, lowest_f32([f64::NEG_INFINITY, f64::from(f32::MIN)])),
        (DType::F16, lowest_f32([f64::NEG_INFINITY, -1e5]).to_dtype(DType::F32).unwrap()),
        (DType::F64, lowest_f32([f64::NEG_INFINITY, f64::MIN])),
    ] {
        let (query, key) = (zeros(&[1, 1], dtype), zeros(&[2, 1], dtype));
        let value = Tensor::new(&[[7f64], [3.]], &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
        let options = AttentionOptions { attn_bias: Some(bias), backend: Backend::Reference, ..Default::default() };
        let context = scaled_dot_product_attention(&query, &key, &value, &options).unwrap().context;
        assert_eq!(context.to_dtype(DType::F64).unwrap().to_vec2::<f64>().unwrap(), [[3.0]], "{dtype:?}");
    }
}

const SCORES: &str = "broadcasts to (batch, num_heads, q_len, kv_len) = [2, 4, 3, 5]";

// Extras.
hostile! {
    mask_of_another_size: options(with_mask(Mask::from_tensor(&zeros(&[3, 4], DType::U8)).unwrap()))
        => Mask, SCORES, "got [3, 4]";
    mask_for_another_batch: options(with_mask(Mask::key_lengths(&[5, 5, 5])))
        => Mask, "expected one for each of 2 sequences", "got 3";
    mask_of_more_keys: options(with_mask(Mask::causal() & Mask::key_lengths(&[5, 6])))
        => Mask, "expected at most kv_len 5", "got 6";
    mask_of_fewer_documents: options(with_mask(Mask::documents(&[4])))
        => Mask, "expected documents of 5 keys together", "got 4 keys";
    bias_of_another_size: options(with_bias(&[3, 4], DType::F32))
        => Shape, SCORES, "got [3, 4]";
    bias_of_other_heads: options(with_bias(&[2, 1, 1], DType::F32))
        => Shape, SCORES, "got [2, 1, 1]";
    bias_of_another_batch: options(with_bias(&[3, 4, 3, 5], DType::F32))
        => Shape, SCORES, "got [3, 4, 3, 5]";
    bias_of_five_axes: options(with_bias(&[1, 1, 1, 1, 5], DType::F32))
        => Shape, SCORES, "got [1, 1, 1, 1, 5]";
    bias_without_elements: options(with_bias(&[0], DType::F32))
        => Shape, SCORES, "got [0]";
    bias_of_integers: options(with_bias(&[3, 5], DType::I64))
        => DType, "attn_bias: expected dtype", "F16, BF16, F32 or F64, got I64";
    bias_of_booleans: options(with_bias(&[3, 5], DType::U8))
        => DType, "attn_bias: expected dtype", "F16, BF16, F32 or F64, got U8";
    slopes_of_other_heads: options(with_slopes(&[3], DType::F32))
        => Shape, "alibi_slopes: expected shape (num_heads) = [4] or (batch, num_heads) = [2, 4]", "got [3]";
    slopes_of_another_batch: options(with_slopes(&[1, 4], DType::F32))
        => Shape, "(batch, num_heads) = [2, 4]", "got [1, 4]";
    slopes_without_axes: options(with_slopes(&[], DType::F32))
        => Shape, "(num_heads) = [4]", "got []";
    slopes_of_integers: options(with_slopes(&[4], DType::U32))
        => DType, "alibi_slopes: expected dtype", "F16, BF16, F32 or F64, got U32";
    sinks_of_other_heads: options(with_sinks(&[2], DType::F32))
        => Shape, "sinks: expected shape (num_heads) = [4]", "got [2]";
    sinks_of_two_axes: options(with_sinks(&[2, 4], DType::F32))
        => Shape, "sinks: expected shape (num_heads) = [4]", "got [2, 4]";
    sinks_without_axes: options(with_sinks(&[], DType::F32))
        => Shape, "sinks: expected shape (num_heads) = [4]", "got []";
    sinks_of_integers: options(with_sinks(&[4], DType::U8))
        => DType, "sinks: expected dtype", "F16, BF16, F32 or F64, got U8";
}

/// One number, broadcast to a tensor of any size. It takes no memory, and the checks must not allocate any.
fn view(dims: [usize; 4]) -> Tensor {
    zeros(&[1, 1, 1, 1], DType::F32).broadcast_as(&dims).unwrap()
}

/// The error for inputs of these sizes.
fn views(query: [usize; 4], key: [usize; 4], value: [usize; 4]) -> AttentionError {
    error([&view(query), &view(key), &view(value)], &AttentionOptions::default())
}

const MEMORY: &str = "expected at most 9223372036854775807 bytes";
const HUGE: usize = 1 << 31;

// Sizes that don't fit into memory: of the scores, of each input, and products of sizes that overflow.
hostile! {
    scores_beyond_memory: views([1, 1, HUGE, 1], [1, 1, HUGE, 1], [1, 1, HUGE, 1])
        => TooLarge, MEMORY, "[1, 1, 2147483648, 2147483648]";
    scores_beyond_counting: views([1, HUGE, HUGE, 1], [1, 1, HUGE, 1], [1, 1, HUGE, 1])
        => TooLarge, MEMORY, "[1, 2147483648, 2147483648, 2147483648]";
    batch_beyond_memory: views([HUGE, 1, HUGE, 1], [HUGE, 1, 1, 1], [HUGE, 1, 1, 1])
        => TooLarge, MEMORY, "[2147483648, 1, 2147483648, 1]";
    query_beyond_memory: views([1, 1, 1 << 55, 64], [1, 1, 1, 64], [1, 1, 1, 1])
        => TooLarge, MEMORY, "[1, 1, 36028797018963968, 64]";
    value_beyond_memory: views([1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1 << 62])
        => TooLarge, MEMORY, "[1, 1, 1, 4611686018427387904]";
    context_beyond_memory: views([1, 1, 1 << 55, 1], [1, 1, 1, 1], [1, 1, 1, 64])
        => TooLarge, MEMORY, "[1, 1, 36028797018963968, 64]";
}
