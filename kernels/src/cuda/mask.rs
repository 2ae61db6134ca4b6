//! Masks as the kernels read them: limits, which are a few numbers; documents, which are a number for each query and each key; and a
//! table of bytes for what is neither.

use super::machine::{Machine, Memory, Region};
use super::mask_parts::{Bytes, Documents, Limits, Parts, allowed, map};
use super::problem::{MAP_BLOCK, RawMask};
use crate::error::Error;
use crate::mask::{Rule, ScoreShape};

/// A rule as the kernels read it, before it is copied to a machine.
#[derive(Debug)]
pub(crate) struct Lowered {
    pub(super) limits: Limits,
    pub(super) documents: Option<Documents>,
    pub(super) table: Option<Bytes>,
    pub(super) map: Option<Bytes>,
    /// The first key that every query may attend to.
    pub(super) always: usize,
}

impl Lowered {
    /// The rule has to fit the shape ([`Rule::check`]).
    ///
    /// # Errors
    ///
    /// [`Error::Memory`] if there is none for a table.
    pub(crate) fn new(rule: &Rule, shape: &ScoreShape) -> Result<Self, Error> {
        Self::with_blocks(rule, shape, MAP_BLOCK)
    }

    /// [`Lowered::new`] with a map of blocks of `block` x `block`.
    pub(super) fn with_blocks(rule: &Rule, shape: &ScoreShape, block: usize) -> Result<Self, Error> {
        let lowered = match Parts::of(rule, shape) {
            Some(Parts { limits, documents, table, always }) => Self {
                documents: documents.map(|of| of.lower(shape)).transpose()?,
                table: table.map(|table| table.lower(shape)).transpose()?,
                limits,
                map: None,
                always,
            },
            None => Self {
                limits: Limits::none(shape),
                documents: None,
                table: Some(allowed(rule, shape, block)?),
                map: None,
                always: shape.kv_len,
            },
        };
        let map = if lowered.is_limits(shape) { None } else { Some(map(rule, shape, block)?) };
        Ok(Self { map, ..lowered })
    }

    /// Whether the limits say everything.
    pub(crate) fn is_limits(&self, shape: &ScoreShape) -> bool {
        self.documents.is_none() && self.table.is_none() && self.always == shape.kv_len
    }

    /// All numbers, without the addresses.
    pub(super) fn raw(&self) -> RawMask {
        let Limits { offsets, keys, .. } = &self.limits;
        let [below, above] = self.limits.sides();
        let strides = |bytes: &Option<Bytes>| bytes.as_ref().map_or([0; 4], |bytes| bytes.strides);
        let [map_batch, map_head, ..] = strides(&self.map);
        RawMask {
            documents_batch: self.documents.as_ref().is_some_and(|documents| documents.by_sequence).into(),
            table_strides: strides(&self.table),
            map_strides: [map_batch, map_head],
            offset: offsets[0],
            below,
            above,
            keys: keys[0],
            always: self.always as i32,
            ..Default::default()
        }
    }

    /// A copy on a machine.
    pub(crate) fn upload(&self, machine: &dyn Machine) -> Result<Uploaded, Error> {
        let mut memory = Vec::new();
        let mut copy = |bytes: &[u8]| {
            let copy = machine.upload("mask", bytes)?;
            let address = copy.address();
            memory.push(copy);
            Ok::<_, Error>(address)
        };
        let mut raw = self.raw();
        if self.limits.offsets.len() > 1 {
            raw.offsets = copy(&to_bytes(&self.limits.offsets))?;
        }
        if self.limits.keys.len() > 1 {
            raw.lengths = copy(&to_bytes(&self.limits.keys))?;
        }
        if let Some(documents) = &self.documents {
            raw.query_documents = copy(&to_bytes(&documents.queries))?;
            raw.key_documents = copy(&to_bytes(&documents.keys))?;
        }
        if let Some(table) = &self.table {
            raw.table = copy(&table.data)?;
        }
        if let Some(map) = &self.map {
            raw.map = copy(&map.data)?;
        }
        Ok(Uploaded { raw, memory })
    }
}

fn to_bytes(numbers: &[i32]) -> Vec<u8> {
    numbers.iter().flat_map(|x| x.to_ne_bytes()).collect()
}

/// A rule on a machine.
pub(crate) struct Uploaded {
    /// With the addresses of `memory`.
    pub(crate) raw: RawMask,
    memory: Vec<Box<dyn Memory>>,
}

impl Uploaded {
    pub(crate) fn regions(&self) -> impl Iterator<Item = Region<'_>> {
        self.memory.iter().map(|memory| Region::of_memory(memory.as_ref()))
    }
}

#[cfg(test)]
#[path = "mask_tests.rs"]
mod tests;
