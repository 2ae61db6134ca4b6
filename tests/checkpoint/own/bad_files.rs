//! Bytes that aren't a checkpoint, and headers with false claims. No memory is allocated for what a header only claims:
//! if it claims more than the machine has, the process would be aborted without an error.

use candle_attention::{CrossAttention, SelfAttention};
use candle_core::{Device, Result};

use crate::layers::assert_error_says;

use super::files::{ENTRY, Parts, assemble, load, small_file};

#[test]
fn truncated_file_is_refused_wherever_it_ends() -> Result<()> {
    let bytes = small_file()?;
    let (first, rest) = (0..64, (64..bytes.len()).step_by(7));
    for len in first.chain(rest).chain([bytes.len() - 1]) {
        assert_error_says(load(&bytes[..len]), &["expected a safetensors file", &format!("got {len} bytes")]);
        assert!(CrossAttention::from_bytes(&bytes[..len], &Device::Cpu).is_err());
    }
    Ok(())
}

#[test]
fn trailing_bytes_are_refused() -> Result<()> {
    let mut bytes = small_file()?;
    bytes.push(0);
    assert_error_says(load(&bytes), &["expected a safetensors file", &format!("got {} bytes", bytes.len())]);
    Ok(())
}

#[test]
fn empty_file_is_refused() {
    assert_error_says(load(&[]), &["expected a safetensors file", "got 0 bytes"]);
}

#[test]
fn text_is_refused() {
    let text = "This is no tensor, nor are these lines a header of one.\n".repeat(20);
    assert_error_says(load(text.as_bytes()), &["expected a safetensors file", "got 1120 bytes"]);
    let json = r#"{"layer": "self_attention", "config": {"embed_dim": 4, "num_heads": 2}}"#;
    assert_error_says(load(json.as_bytes()), &["expected a safetensors file"]);
}

#[test]
fn header_longer_than_the_file_is_refused() -> Result<()> {
    let mut bytes = small_file()?;
    let too_long = bytes.len() as u64 - 7;
    for len in [too_long, 99_999_999, 100_000_001, 1 << 40, i64::MAX as u64, u64::MAX - 7, u64::MAX] {
        bytes[..8].copy_from_slice(&len.to_le_bytes());
        assert_error_says(load(&bytes), &["expected a safetensors file"]);
    }
    Ok(())
}

#[test]
fn header_shorter_than_it_is_is_refused() -> Result<()> {
    let mut bytes = small_file()?;
    for len in [0u64, 1, 2, 30] {
        bytes[..8].copy_from_slice(&len.to_le_bytes());
        assert_error_says(load(&bytes), &["expected a safetensors file"]);
    }
    Ok(())
}

#[test]
fn header_that_is_no_json_object_is_refused() {
    for header in ["", "null", "[]", "7", "\"text\"", "{", "{]", r#"{"a": }"#, "{\"\u{0}\": 1}"] {
        assert_error_says(load(&assemble(header, &[])), &["expected a safetensors file"]);
    }
    let not_utf8 = [&4u64.to_le_bytes()[..], &[0xFF, 0xFE, 0x80, 0x81]].concat();
    assert_error_says(load(&not_utf8), &["expected a safetensors file"]);
}

#[test]
fn deeply_nested_header_is_refused() {
    for open in ["[", "{\"a\":"] {
        assert_error_says(load(&assemble(&open.repeat(100_000), &[])), &["expected a safetensors file"]);
    }
}

/// One tensor of four bytes, under the metadata of a layer.
fn file_with_tensor(tensor: &str) -> Result<Vec<u8>> {
    let metadata = serde_json::to_string(&Parts::small()?.metadata).expect("JSON");
    Ok(assemble(&format!(r#"{{"__metadata__":{metadata},"q_proj.weight":{tensor}}}"#), &[0; 4]))
}

#[test]
fn offsets_that_lie_are_refused() -> Result<()> {
    let max = u64::MAX;
    for offsets in [
        "[0, 8]".to_string(),
        "[4, 8]".to_string(),
        "[4, 0]".to_string(),
        "[1, 5]".to_string(),
        "[0, 3]".to_string(),
        "[-4, 0]".to_string(),
        "[0]".to_string(),
        format!("[0, {max}]"),
        format!("[{}, {max}]", max - 4),
        "[0, 36893488147419103232]".to_string(),
    ] {
        let file = file_with_tensor(&format!(r#"{{"dtype":"F32","shape":[1],"data_offsets":{offsets}}}"#))?;
        assert_error_says(load(&file), &["expected a safetensors file"]);
    }
    Ok(())
}

#[test]
fn shape_whose_product_overflows_is_refused() -> Result<()> {
    for shape in [
        "[4294967296, 4294967296]",
        "[18446744073709551615, 2]",
        "[4294967296, 4294967297, 0]",
        "[2305843009213693952, 8]",
        "[18446744073709551615]",
    ] {
        let file = file_with_tensor(&format!(r#"{{"dtype":"F32","shape":{shape},"data_offsets":[0,4]}}"#))?;
        assert_error_says(load(&file), &["expected a safetensors file"]);
    }
    Ok(())
}

#[test]
fn tensor_that_is_only_claimed_is_refused() -> Result<()> {
    for exponent in [20u32, 34, 40, 50, 58] {
        let (len, bytes) = (1u64 << exponent, 1u64 << (exponent + 2));
        let file = file_with_tensor(&format!(r#"{{"dtype":"F32","shape":[{len}],"data_offsets":[0,{bytes}]}}"#))?;
        assert_error_says(load(&file), &["expected a safetensors file"]);
    }
    Ok(())
}

/// Each claimed size fits into 64 bits, but their sum doesn't.
#[test]
fn claims_whose_sum_overflows_are_refused() {
    let size = (1u64 << 61) - 1;
    let tensor = |i: u64| {
        let (start, end) = (i * size, (i + 1) * size);
        format!(r#""t{i}":{{"dtype":"U8","shape":[{size}],"data_offsets":[{start},{end}]}}"#)
    };
    let tensors: Vec<String> = (0..8).map(tensor).collect();
    let file = assemble(&format!("{{{}}}", tensors.join(",")), &[]);
    assert_error_says(load(&file), &["expected a safetensors file"]);
}

#[test]
fn dtype_that_nobody_knows_is_refused() -> Result<()> {
    for dtype in ["F23", "", "f32", "INT"] {
        let file = file_with_tensor(&format!(r#"{{"dtype":"{dtype}","shape":[1],"data_offsets":[0,4]}}"#))?;
        assert_error_says(load(&file), &["expected a safetensors file"]);
    }
    Ok(())
}

#[test]
fn file_without_metadata_is_no_checkpoint() -> Result<()> {
    let parts = Parts::small()?;
    let bytes = safetensors::serialize(&parts.tensors, None)?;
    assert_error_says(load(&bytes), &[ENTRY, "expected a config", "got none"]);
    assert_error_says(load(&assemble("{}", &[])), &[ENTRY, "expected a config", "got none"]);
    let foreign = Parts { metadata: [("format".to_string(), "pt".to_string())].into(), ..parts };
    assert_error_says(foreign.load(), &[ENTRY, "expected a config", "got none"]);
    Ok(())
}

#[test]
fn folder_in_place_of_a_file_is_refused() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let name = folder.path().display().to_string();
    assert_error_says(SelfAttention::load(folder.path(), &Device::Cpu), &[&name, "can't read"]);
    Ok(())
}

#[test]
fn missing_file_is_named() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("nowhere.safetensors");
    let name = path.display().to_string();
    assert_error_says(SelfAttention::load(&path, &Device::Cpu), &[&name, "can't read"]);
    assert_error_says(CrossAttention::load(&path, &Device::Cpu), &[&name, "can't read"]);
    assert_error_says(SelfAttention::load("", &Device::Cpu), &["can't read"]);
    Ok(())
}

#[test]
fn bad_file_is_named() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("bad.safetensors");
    std::fs::write(&path, "not safetensors")?;
    assert_error_says(
        SelfAttention::load(&path, &Device::Cpu),
        &["bad.safetensors", "expected a safetensors file", "got 15 bytes"],
    );
    Ok(())
}

#[test]
fn name_that_stands_twice_is_told() -> Result<()> {
    let bytes = small_file()?;
    let len = u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes")) as usize;
    let (header, data) = (std::str::from_utf8(&bytes[8..8 + len]).expect("text"), &bytes[8 + len..]);
    let renamed = |from: &str, to: &str| assemble(&header.replace(from, to), data);
    assert_error_says(
        load(&renamed("\"k_proj.weight\"", "\"q_proj.weight\"")),
        &["expected a safetensors file", "`q_proj.weight` twice"],
    );
    // In the metadata, too: one of two configs would be taken.
    assert_error_says(load(&renamed("\"format\"", &format!("\"{ENTRY}\""))), &[&format!("`{ENTRY}` twice")]);
    Ok(())
}
