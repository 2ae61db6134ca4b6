//! A rule, taken apart: limits, documents and a table whose conjunction it is; or a table of all scores.

use std::ops::Range;
use std::sync::Arc;

use crate::alloc::{filled, product, reserve};
use crate::error::Error;
use crate::mask::{Coverage, Offset, PerSequence, Rule, ScoreShape, Table};
use crate::schedule::for_each_chunk;

/// The most queries or keys of a sequence. Sums of a position and a side of a band then are less than 2^31.
pub(super) const MAX_LEN: usize = 1 << 28;
/// A band that reaches as far holds all keys, from any position.
const FARTHEST_SIDE: i64 = 1 << 30;
/// The farthest position of the first query.
const FARTHEST_OFFSET: i64 = 1 << 29;

/// The part of a rule that is a few numbers.
#[derive(Debug)]
pub(super) struct Limits {
    /// The position of the first query: one for all sequences, or one for each.
    pub(super) offsets: Vec<i32>,
    below: Option<i64>,
    above: Option<i64>,
    /// How many keys there are, likewise.
    pub(super) keys: Vec<i32>,
}

impl Limits {
    /// All keys.
    pub(super) fn none(shape: &ScoreShape) -> Self {
        Self { offsets: vec![0], below: None, above: None, keys: vec![shape.kv_len as i32] }
    }

    /// How far before and behind its position a query sees.
    pub(super) fn sides(&self) -> [i32; 2] {
        [self.below, self.above]
            .map(|side| side.map_or(FARTHEST_SIDE, |side| side.clamp(-FARTHEST_SIDE, FARTHEST_SIDE)) as i32)
    }
}

/// The documents of keys, and where the queries stand.
pub(super) struct KeyDocuments {
    ids: PerSequence<Arc<[u32]>>,
    offset: Offset,
    /// How many keys have a document.
    keys: usize,
}

/// A table of the first keys.
pub(super) struct KeyTable(Arc<Table>);

/// A rule that is the conjunction of these.
pub(super) struct Parts {
    pub(super) limits: Limits,
    pub(super) documents: Option<KeyDocuments>,
    pub(super) table: Option<KeyTable>,
    /// The first key that every query may attend to.
    pub(super) always: usize,
}

/// Parts that are being collected.
#[derive(Default)]
struct Collected {
    offsets: Option<Vec<i64>>,
    below: Option<i64>,
    above: Option<i64>,
    lengths: Vec<PerSequence<usize>>,
    documents: Option<KeyDocuments>,
    table: Option<KeyTable>,
}

impl Parts {
    /// None if the rule can't be taken apart.
    pub(super) fn of(rule: &Rule, shape: &ScoreShape) -> Option<Self> {
        let (inner, keys, always) = match rule {
            Rule::Extra { rule, count, visible } => {
                let keys = shape.kv_len - count;
                (rule.as_ref(), keys, if *visible { keys } else { shape.kv_len })
            }
            rule => (rule, shape.kv_len, shape.kv_len),
        };
        let mut collected = Collected::default();
        collected.take(inner, &ScoreShape { kv_len: keys, ..*shape }).then_some(())?;
        let limits = collected.limits(shape.batch, keys)?;
        Some(Self { limits, documents: collected.documents, table: collected.table, always })
    }
}

impl Collected {
    /// Adds a condition. False if that can't be done.
    fn take(&mut self, rule: &Rule, shape: &ScoreShape) -> bool {
        match rule {
            Rule::Full => true,
            Rule::Band { below, above, offset } => self.take_band([*below, *above], resolved(offset, shape)),
            Rule::FirstKeys(lengths) => {
                self.lengths.push(lengths.clone());
                true
            }
            Rule::Documents { ids, offset } => self.take_documents(ids.clone(), offset, shape),
            Rule::Packed { ends, offset } => {
                let ids = (0..shape.kv_len).map(|j| ends.partition_point(|&end| end <= j) as u32).collect();
                self.take_documents(PerSequence::Same(ids), offset, shape)
            }
            Rule::Table(table) if self.table.is_none() => {
                self.table = Some(KeyTable(table.clone()));
                true
            }
            Rule::Both(rules) => rules.rules().iter().all(|rule| self.take(rule, shape)),
            _ => false,
        }
    }

    /// Several bands have to have the same offsets.
    fn take_band(&mut self, sides: [Option<i64>; 2], offsets: Vec<i64>) -> bool {
        let [below, above] = sides.map(|side| side.filter(|&side| side != i64::MAX));
        if below.is_none() && above.is_none() {
            return true;
        }
        let narrower = |a: Option<i64>, b: Option<i64>| a.into_iter().chain(b).min();
        (self.below, self.above) = (narrower(self.below, below), narrower(self.above, above));
        *self.offsets.get_or_insert_with(|| offsets.clone()) == offsets
    }

    fn take_documents(&mut self, ids: PerSequence<Arc<[u32]>>, offset: &Offset, shape: &ScoreShape) -> bool {
        let documents = KeyDocuments { ids, offset: Some(per_sequence(offset, shape)), keys: shape.kv_len };
        self.documents.replace(documents).is_none()
    }

    /// None if they can't be told in 32 bits.
    fn limits(&self, batch: usize, keys: usize) -> Option<Limits> {
        let offsets = self.offsets.as_deref().unwrap_or(&[0]);
        let is_near = offsets.iter().all(|offset| (-FARTHEST_OFFSET..=FARTHEST_OFFSET).contains(offset));
        let is_narrow = |side: Option<i64>| side.is_none_or(|side| side.unsigned_abs() < MAX_LEN as u64);
        let are_narrow = is_narrow(self.below) && is_narrow(self.above);
        if !is_near && !are_narrow {
            return None;
        }
        let offsets = offsets.iter().map(|&offset| offset.clamp(-FARTHEST_OFFSET, FARTHEST_OFFSET) as i32).collect();
        let varies = self.lengths.iter().any(|lengths| matches!(lengths, PerSequence::Each(_)));
        let shortest = |b| self.lengths.iter().map(|lengths| *value(lengths, b)).fold(keys, usize::min);
        let keys = (0..if varies { batch } else { 1 }).map(|b| shortest(b) as i32).collect();
        Some(Limits { offsets, below: self.below, above: self.above, keys })
    }
}

fn value<T>(values: &PerSequence<T>, b: usize) -> &T {
    match values {
        PerSequence::Same(value) => value,
        PerSequence::Each(values) => &values[b],
    }
}

/// The offset, with the last query at the last key if none is given.
fn per_sequence(offset: &Offset, shape: &ScoreShape) -> PerSequence<i64> {
    offset.clone().unwrap_or(PerSequence::Same(shape.kv_len as i64 - shape.q_len as i64))
}

/// The offsets as a list: one if all sequences share it.
fn resolved(offset: &Offset, shape: &ScoreShape) -> Vec<i64> {
    match per_sequence(offset, shape) {
        PerSequence::Same(offset) => vec![offset],
        PerSequence::Each(offsets) if offsets.iter().all(|offset| *offset == offsets[0]) => vec![offsets[0]],
        PerSequence::Each(offsets) => offsets.to_vec(),
    }
}

/// The document of each query and of each key.
#[derive(Debug)]
pub(super) struct Documents {
    pub(super) queries: Vec<i32>,
    pub(super) keys: Vec<i32>,
    pub(super) by_sequence: bool,
}

impl KeyDocuments {
    /// Numbers of the queries and keys of a shape that has these keys and perhaps more behind them.
    pub(super) fn lower(&self, shape: &ScoreShape) -> Result<Documents, Error> {
        let offset = self.offset.as_ref().expect("an offset");
        let by_sequence = matches!(self.ids, PerSequence::Each(_)) || matches!(self.offset, Some(PerSequence::Each(_)));
        let sequences = if by_sequence { shape.batch } else { 1 };
        let mut queries = reserve("documents of the queries", sequences * shape.q_len)?;
        let mut keys = reserve("documents of the keys", sequences * shape.kv_len)?;
        for b in 0..sequences {
            let (ids, first) = (value(&self.ids, b), *value(offset, b));
            let none = unused(ids)?;
            keys.extend(ids.iter().map(|&id| id as i32));
            keys.extend(std::iter::repeat_n(none, shape.kv_len - self.keys));
            queries.extend((0..shape.q_len).map(|i| {
                let position = usize::try_from(first.saturating_add(i as i64));
                position.ok().and_then(|position| ids.get(position)).map_or(none + 1, |&id| id as i32)
            }));
        }
        Ok(Documents { queries, keys, by_sequence })
    }
}

/// A number such that neither it nor the next one is an id.
fn unused(ids: &[u32]) -> Result<i32, Error> {
    // Of so many pairs at least one holds no id.
    let mut is_used = filled("documents", ids.len() + 1, false)?;
    for &id in ids {
        if let Some(used) = is_used.get_mut(id as usize / 2) {
            *used = true;
        }
    }
    Ok(2 * is_used.iter().position(|used| !used).expect("more pairs than ids") as i32)
}

/// Bytes of four axes, and their strides; 0 where they broadcast.
#[derive(Debug)]
pub(super) struct Bytes {
    pub(super) data: Vec<u8>,
    pub(super) strides: [i64; 4],
}

impl Bytes {
    fn new(data: Vec<u8>, dims: [usize; 4]) -> Self {
        let (mut strides, mut stride) = ([0; 4], 1);
        for (to, dim) in strides.iter_mut().zip(dims).rev() {
            *to = if dim == 1 { 0 } else { stride };
            stride *= dim as i64;
        }
        Self { data, strides }
    }
}

impl KeyTable {
    /// The bytes for a shape that has the table's keys and perhaps more behind them.
    pub(super) fn lower(&self, shape: &ScoreShape) -> Result<Bytes, Error> {
        let ([batch, heads, q_len, keys], allowed) = (self.0.dims(), self.0.allowed());
        // A table that broadcasts along the keys holds for the keys behind them, too: those are hidden or seen by other conditions.
        let dims = [batch, heads, q_len, if keys == 1 { 1 } else { shape.kv_len }];
        let mut data = reserve("mask", product("mask", &dims)?)?;
        for row in 0..batch * heads * q_len {
            data.extend(allowed[row * keys..][..keys].iter().map(|&x| u8::from(x)));
            data.resize((row + 1) * dims[3], 0);
        }
        Ok(Bytes::new(data, dims))
    }
}

/// Sequences and heads between which a rule differs, each at least 1.
fn distinct(rule: &Rule, shape: &ScoreShape) -> [usize; 2] {
    let batch = if rule.varies_by_sequence() { shape.batch } else { 1 };
    [batch, if rule.varies_by_head() { shape.num_heads } else { 1 }]
}

fn blocks(len: usize, block: usize) -> impl Iterator<Item = Range<usize>> {
    (0..len).step_by(block).map(move |start| start..(start + block).min(len))
}

/// What the rule says of blocks of `block` x `block`: 0 none visible, 1 some, 2 all.
pub(super) fn map(rule: &Rule, shape: &ScoreShape, block: usize) -> Result<Bytes, Error> {
    const WHAT: &str = "map of a mask";
    let [batch, heads] = distinct(rule, shape);
    let dims = [batch, heads, shape.q_len.div_ceil(block), shape.kv_len.div_ceil(block)];
    let mut data = filled(WHAT, product(WHAT, &dims)?, 0u8)?;
    for_each_chunk(&mut data, dims[3], |row, data| {
        let (head, first) = (row / dims[2], row % dims[2] * block);
        let queries = first..(first + block).min(shape.q_len);
        for (keys, byte) in blocks(shape.kv_len, block).zip(data) {
            *byte = match rule.tile(shape, (head / heads, head % heads), &queries, &keys) {
                Coverage::None => 0,
                Coverage::Some => 1,
                Coverage::All => 2,
            };
        }
    });
    Ok(Bytes::new(data, dims))
}

/// A table of all scores, block by block.
pub(super) fn allowed(rule: &Rule, shape: &ScoreShape, block: usize) -> Result<Bytes, Error> {
    const WHAT: &str = "mask as a table";
    let [batch, heads] = distinct(rule, shape);
    let dims = [batch, heads, shape.q_len, shape.kv_len];
    let mut data = filled(WHAT, product(WHAT, &dims)?, 0u8)?;
    for (head, data) in data.chunks_mut(shape.q_len * shape.kv_len).enumerate() {
        let at = (head / heads, head % heads);
        for_each_chunk(data, block * shape.kv_len, |chunk, data| {
            let queries = chunk * block..(chunk * block + block).min(shape.q_len);
            for keys in blocks(shape.kv_len, block) {
                let coverage = rule.tile(shape, at, &queries, &keys);
                for (i, row) in queries.clone().zip(data.chunks_mut(shape.kv_len)) {
                    let row = &mut row[keys.clone()];
                    match coverage {
                        Coverage::None => {}
                        Coverage::All => row.fill(1),
                        Coverage::Some => {
                            let sees = |j| u8::from(rule.allows(shape, at.0, at.1, i, j));
                            row.iter_mut().zip(keys.clone()).for_each(|(byte, j)| *byte = sees(j));
                        }
                    }
                }
            }
        });
    }
    Ok(Bytes::new(data, dims))
}
