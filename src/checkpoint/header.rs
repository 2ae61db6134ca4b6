//! The header of a safetensors file: JSON objects that describe the tensors, and one with metadata.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::Value;

use crate::unique_map::UniqueMap;

/// Refuses what the safetensors crate doesn't name or doesn't expect: a name that stands twice, and a tensor that ends
/// after the end of a file of `len` bytes. (The crate adds up the numbers of the header, and the sum could overflow.)
pub(super) fn check_header(header: &[u8], len: u64) -> Result<(), String> {
    let entries = serde_json::from_slice::<UniqueMap<UniqueMap<Value>>>(header).map_err(|error| error.to_string())?;
    for (name, entry) in entries.0 {
        let offsets = entry.into_map().get("data_offsets").map(<(u64, u64)>::deserialize);
        match offsets {
            Some(Ok((_, end))) if end > len => return Err(format!("`{name}` ends at byte {end} of the data")),
            _ => {}
        }
    }
    Ok(())
}

/// Sorts the header of a file that the safetensors crate has written. The crate writes the metadata in the order of a
/// `HashMap`, which differs from call to call, and a layer should always be saved as the same bytes.
pub(super) fn sort_header(file: &mut [u8]) -> serde_json::Result<()> {
    let Some((len, rest)) = file.split_first_chunk_mut() else { return Ok(()) };
    let header = usize::try_from(u64::from_le_bytes(*len)).ok().and_then(|len| rest.get_mut(..len));
    let Some(header) = header else { return Ok(()) };
    let entries: BTreeMap<String, BTreeMap<String, Value>> = serde_json::from_slice(header)?;
    let sorted = serde_json::to_vec(&entries)?;
    // It is as long as before, without the spaces at the end, which align the data.
    if let Some(start) = header.get_mut(..sorted.len()) {
        start.copy_from_slice(&sorted);
    }
    Ok(())
}
