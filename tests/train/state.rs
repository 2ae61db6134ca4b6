//! The state of AdamW in files.

use std::collections::HashMap;

use candle_attention::train::{AdamW, AdamWConfig, MissingGradients};
use candle_attention::{AttentionError, Error};
use candle_core::backprop::GradStore;
use candle_core::{DType, Tensor, Var};
use safetensors::SafeTensors;

use crate::common::{assert_same_bits, randn, var};

fn parameters() -> Vec<(String, Var)> {
    let dtypes = [DType::F32, DType::F64, DType::BF16];
    let var = |i: u64| (format!("layer.{i}"), var(i, (2, 3 + i as usize), dtypes[i as usize % 3]).unwrap());
    (0..4).map(var).collect()
}

fn gradients(parameters: &[(String, Var)], step: u64) -> GradStore {
    let mut store = GradStore::default();
    for (i, (_, var)) in parameters.iter().enumerate() {
        store.insert(var, randn(step * 10 + i as u64, var.shape(), var.dtype()).unwrap());
    }
    store
}

fn run(optimizer: &mut AdamW, parameters: &[(String, Var)], steps: std::ops::Range<u64>) {
    steps.for_each(|step| optimizer.step(&gradients(parameters, step)).unwrap());
}

#[test]
fn a_resumed_run_has_the_bits_of_an_uninterrupted_one() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("adamw.safetensors");
    let whole = parameters();
    run(&mut AdamW::new(&whole, AdamWConfig::default()).unwrap(), &whole, 0..7);

    let first = parameters();
    let mut optimizer = AdamW::new(&first, AdamWConfig::default()).unwrap();
    run(&mut optimizer, &first, 0..3);
    optimizer.save(&file).unwrap();
    let second: Vec<_> =
        first.iter().map(|(name, var)| (name.clone(), Var::from_tensor(&var.copy().unwrap()).unwrap())).collect();
    let mut resumed = AdamW::new(&second, AdamWConfig::default()).unwrap();
    resumed.load(&file).unwrap();
    assert_eq!(resumed.steps(), 3);
    run(&mut resumed, &second, 3..7);
    for ((name, resumed), (_, whole)) in second.iter().zip(&whole) {
        assert_same_bits(resumed, whole, name);
    }
}

#[test]
fn parameters_that_were_skipped_keep_their_own_counts_of_steps() {
    let skip = |parameters: &[(String, Var)]| {
        AdamW::new(parameters, AdamWConfig::default()).unwrap().with_missing_gradients(MissingGradients::Skip)
    };
    let all = parameters();
    let mut optimizer = skip(&all);
    let mut some = gradients(&all, 1);
    some.remove(&all[2].1);
    optimizer.step(&some).unwrap();
    let mut restored = skip(&all);
    restored.load_bytes(&optimizer.to_bytes().unwrap()).unwrap();
    assert_eq!(restored.to_bytes().unwrap(), optimizer.to_bytes().unwrap());
    let (_, metadata) = SafeTensors::read_metadata(&optimizer.to_bytes().unwrap()).unwrap();
    let header = &metadata.metadata().as_ref().unwrap()["candle_attention_adamw"];
    assert!(header.contains(r#""parameter_steps":{"layer.2":0}"#), "{header}");
}

fn error(result: Result<(), Error>) -> AttentionError {
    match result {
        Err(Error::Attention(error)) => error,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_state_of_another_model_is_one_error_and_changes_nothing() {
    let ours = parameters();
    let mut optimizer = AdamW::new(&ours, AdamWConfig::default()).unwrap();
    run(&mut optimizer, &ours, 0..2);
    let before = optimizer.to_bytes().unwrap();

    let mut others = parameters();
    others[0] = ("layer.0".into(), var(9, (3, 3), DType::F32).unwrap());
    others[1] = ("layer.1".into(), var(9, (2, 4), DType::F32).unwrap());
    others[3].0 = "other".into();
    let theirs = AdamW::new(&others, AdamWConfig::default()).unwrap().to_bytes().unwrap();
    let AttentionError::OptimizerState { path: None, problems } = error(optimizer.load_bytes(&theirs)) else {
        panic!("another error");
    };
    assert_eq!(
        problems,
        [
            "`layer.0.first_moment`: expected shape [2, 3], got [3, 3]",
            "`layer.0.second_moment`: expected shape [2, 3], got [3, 3]",
            "`layer.1.first_moment`: expected dtype F64, got F32",
            "`layer.1.second_moment`: expected dtype F64, got F32",
            "`layer.3.first_moment` is missing, expected [2, 6]",
            "`layer.3.second_moment` is missing, expected [2, 6]",
            "`other.first_moment` is unexpected",
            "`other.second_moment` is unexpected",
        ]
    );
    assert_eq!(optimizer.to_bytes().unwrap(), before);
}

#[test]
fn files_that_are_no_state_are_refused_and_change_nothing() {
    let parameters = parameters();
    let mut optimizer = AdamW::new(&parameters, AdamWConfig::default()).unwrap();
    run(&mut optimizer, &parameters, 0..2);
    let before = optimizer.to_bytes().unwrap();

    let mut cut = before.clone();
    cut.truncate(before.len() - 8);
    let no_metadata =
        safetensors::serialize([("x", Tensor::new(1f32, &candle_core::Device::Cpu).unwrap())], None).unwrap();
    let with_entry = |json: &str, value: f32| {
        let tensors =
            optimizer.state().unwrap().into_iter().map(|(name, x)| (name, x.affine(0.0, f64::from(value)).unwrap()));
        let metadata = HashMap::from([("candle_attention_adamw".to_string(), json.to_string())]);
        safetensors::serialize(tensors, Some(metadata)).unwrap()
    };
    let json = r#"{"steps":2,"config":{"lr":0.1}}"#;
    let (no_json, infinite) = (with_entry("{}", 0.0), with_entry(json, f32::INFINITY));
    for (bytes, expected) in [
        (&b"nothing"[..], "checkpoint: expected a safetensors file, got 7 bytes that aren't one"),
        (&cut, "checkpoint: expected a safetensors file, got"),
        (
            &no_metadata,
            "checkpoint: expected steps and settings in the metadata entry `candle_attention_adamw`, got none",
        ),
        (
            &no_json,
            "checkpoint: expected steps and settings in the metadata entry `candle_attention_adamw`, got {}, which",
        ),
        (
            &infinite,
            "checkpoint: state that doesn't fit the parameters: `layer.0.first_moment`: expected finite numbers",
        ),
    ] {
        let text = error(optimizer.load_bytes(bytes)).to_string();
        assert!(text.starts_with(expected), "{text}");
        assert_eq!(optimizer.to_bytes().unwrap(), before);
    }
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("no_state.safetensors");
    assert!(matches!(error(optimizer.load(&file)), AttentionError::File(_)));
    std::fs::write(&file, &no_metadata).unwrap();
    assert!(error(optimizer.load(&file)).to_string().starts_with(&format!("checkpoint {}: ", file.display())));
}
