//! Every constructor and many combinations, each with its definition in closed form.

use std::rc::Rc;

use candle_attention::Mask;
use candle_core::{DType, Device, Tensor};

use crate::common::Random;

/// The sizes of the scores.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub batch: usize,
    pub num_heads: usize,
    pub q_len: usize,
    pub kv_len: usize,
}

impl Shape {
    pub fn dims(self) -> (usize, usize, usize, usize) {
        (self.batch, self.num_heads, self.q_len, self.kv_len)
    }
}

/// A score: the sizes, and (sequence, head, query, key).
#[derive(Clone, Copy)]
pub struct Score {
    pub shape: Shape,
    pub b: usize,
    pub h: usize,
    pub i: usize,
    pub j: usize,
}

impl Score {
    /// The position of the query. The last query is at the position of the last key.
    fn query(&self) -> i64 {
        self.i as i64 + self.shape.kv_len as i64 - self.shape.q_len as i64
    }

    fn key(&self) -> i64 {
        self.j as i64
    }
}

/// A mask, and the definition of what it allows.
#[derive(Clone)]
pub struct Case {
    pub name: String,
    pub mask: Mask,
    pub allows: Rc<dyn Fn(Score) -> bool>,
}

impl Case {
    fn new(name: impl Into<String>, mask: Mask, allows: impl Fn(Score) -> bool + 'static) -> Self {
        Self { name: name.into(), mask, allows: Rc::new(allows) }
    }

    fn and(&self, other: &Self) -> Self {
        let (a, b) = (self.allows.clone(), other.allows.clone());
        let name = format!("({} & {})", self.name, other.name);
        Self::new(name, self.mask.clone() & other.mask.clone(), move |at| a(at) && b(at))
    }

    fn or(&self, other: &Self) -> Self {
        let (a, b) = (self.allows.clone(), other.allows.clone());
        let name = format!("({} | {})", self.name, other.name);
        Self::new(name, self.mask.clone() | other.mask.clone(), move |at| a(at) || b(at))
    }
}

/// All sizes: 0 to 5 queries and keys, one or two sequences and heads.
pub fn shapes() -> Vec<Shape> {
    let mut shapes = Vec::new();
    for (batch, num_heads) in [(1, 1), (2, 1), (1, 2), (2, 2)] {
        for q_len in 0..=5 {
            shapes.extend((0..=5).map(|kv_len| Shape { batch, num_heads, q_len, kv_len }));
        }
    }
    shapes
}

/// Every case that fits scores of this shape.
pub fn all(shape: Shape) -> Vec<Case> {
    let simple = [bands(), key_lengths(shape), documents(shape), tables(shape)].concat();
    let combined = combinations(shape);
    let moved = [with_offset(shape), with_offsets(shape)].concat();
    [simple, combined, moved, with_extra_keys(shape)].concat()
}

fn within(below: Option<usize>, above: Option<usize>) -> impl Fn(i64, i64) -> bool + Copy {
    move |query, key| {
        let before = below.is_none_or(|below| i128::from(query) - i128::from(key) <= below as i128);
        let after = above.is_none_or(|above| i128::from(key) - i128::from(query) <= above as i128);
        before && after
    }
}

pub fn bands() -> Vec<Case> {
    let causal = Case::new("causal", Mask::causal(), |at| at.key() <= at.query());
    let mut cases = vec![Case::new("full", Mask::full(), |_| true), causal];
    let sides = [None, Some(0), Some(1), Some(2), Some(6), Some(usize::MAX)];
    for left in sides {
        for right in sides {
            let allows = within(left, right);
            let name = format!("window({left:?}, {right:?})");
            let mask = Mask::window(left, right);
            cases.push(Case::new(name, mask, move |at| allows(at.query(), at.key())));
        }
    }
    for width in [0, 1, 2, 3, 6, usize::MAX] {
        let allows = move |at: Score| at.key() <= at.query() && ((at.query() - at.key()) as usize) < width;
        cases.push(Case::new(format!("sliding_window({width})"), Mask::sliding_window(width), allows));
    }
    cases
}

fn key_lengths(shape: Shape) -> Vec<Case> {
    let mut cases = Vec::new();
    for first in 0..=shape.kv_len {
        let lengths = [first, shape.kv_len - first][..shape.batch].to_vec();
        let (name, mask) = (format!("key_lengths({lengths:?})"), Mask::key_lengths(&lengths));
        cases.push(Case::new(name, mask, move |at| at.j < lengths[at.b]));
    }
    for len in [0, 1, 3, 6, usize::MAX] {
        cases.push(Case::new(format!("prefix({len})"), Mask::prefix(len), move |at| at.j < len));
    }
    cases
}

/// Whether the positions `a` and `b` are in the same document, for consecutive documents of these lengths.
fn in_same_document(lengths: &[usize], a: i64, b: i64) -> bool {
    let mut start = 0;
    lengths.iter().any(|&len| {
        let document = start..start + len as i64;
        start = document.end;
        document.contains(&a) && document.contains(&b)
    })
}

/// Ways to divide `kv_len` keys into documents, some of them empty.
fn partitions(kv_len: usize) -> Vec<Vec<usize>> {
    let mut partitions = vec![vec![1; kv_len], vec![0, kv_len, 0]];
    partitions.extend((0..=kv_len).map(|first| vec![first, 0, kv_len - first]));
    partitions
}

/// A random document for each key, with one row for each sequence.
fn document_ids(shape: Shape, seed: u64) -> Vec<Vec<u32>> {
    let mut random = Random::new(seed);
    let mut row = || (0..shape.kv_len).map(|_| random.below(3) as u32).collect();
    (0..shape.batch).map(|_| row()).collect()
}

fn documents(shape: Shape) -> Vec<Case> {
    let mut cases = Vec::new();
    for lengths in partitions(shape.kv_len) {
        let (name, mask) = (format!("documents({lengths:?})"), Mask::documents(&lengths));
        cases.push(Case::new(name, mask, move |at| in_same_document(&lengths, at.query(), at.key())));
    }
    for seed in 0..3 {
        let ids = document_ids(shape, seed);
        let (name, mask) = (format!("document_ids({ids:?})"), Mask::document_ids(&ids));
        let of_query = |ids: &[u32], at: Score| usize::try_from(at.query()).ok().map(|query| ids[query]);
        cases.push(Case::new(name, mask, move |at| of_query(&ids[at.b], at) == Some(ids[at.b][at.j])));
    }
    cases
}

/// A random boolean tensor of an integer dtype, and the function that reads it at (sequence, head, query, key).
fn table(dims: &[usize], seed: u64) -> (Tensor, impl Fn(Score) -> bool + Clone + 'static) {
    let mut random = Random::new(seed);
    let values: Vec<i64> = (0..dims.iter().product()).map(|_| random.below(3) as i64 - 1).collect();
    // -1 counts as true. The unsigned dtypes hold 1 instead.
    let (dtype, dims) = ([DType::U8, DType::U32, DType::I64][seed as usize % 3], dims.to_vec());
    let stored = values.iter().map(|x| if dtype == DType::I64 { *x } else { x.abs() }).collect();
    let tensor = Tensor::from_vec(stored, dims.clone(), &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
    let entry = move |at: Score| {
        let indices = [at.b, at.h, at.i, at.j];
        let mut offset = 0;
        for (axis, &dim) in dims.iter().enumerate() {
            let index = indices[axis + 4 - dims.len()];
            offset = offset * dim + if dim == 1 { 0 } else { index };
        }
        values[offset] != 0
    };
    (tensor, entry)
}

fn tables(shape: Shape) -> Vec<Case> {
    let sizes = [shape.batch, shape.num_heads, shape.q_len, shape.kv_len];
    let mut cases = Vec::new();
    for kept in 0..16usize {
        let dims: Vec<usize> = (0..4).map(|axis| if kept >> axis & 1 == 1 { sizes[axis] } else { 1 }).collect();
        for rank in 0..=4 {
            let dims = &dims[4 - rank..];
            let (tensor, entry) = table(dims, kept as u64);
            let mask = Mask::from_tensor(&tensor).unwrap();
            cases.push(Case::new(format!("from_tensor({dims:?})"), mask, entry.clone()));
            let mask = Mask::from_blocked(&tensor).unwrap();
            cases.push(Case::new(format!("from_blocked({dims:?})"), mask, move |at| !entry(at)));
        }
    }
    let (padding, entry) = table(&[shape.batch, 1, 1, shape.kv_len], 5);
    let mask = Mask::from_padding_mask(&padding.reshape((shape.batch, shape.kv_len)).unwrap()).unwrap();
    cases.push(Case::new("from_padding_mask", mask, move |at| !entry(at)));
    cases
}

/// One or two masks of each kind, for combinations.
fn samples(shape: Shape) -> Vec<Case> {
    let sizes = [shape.batch, shape.num_heads, shape.q_len, shape.kv_len];
    let (tensor, entry) = table(&sizes, 8);
    let lengths = [shape.kv_len / 2, shape.kv_len][..shape.batch].to_vec();
    let mut samples = vec![
        Case::new("full", Mask::full(), |_| true),
        Case::new("causal", Mask::causal(), |at| at.key() <= at.query()),
        Case::new("window", Mask::window(Some(1), Some(2)), |at| within(Some(1), Some(2))(at.query(), at.key())),
        Case::new("prefix", Mask::prefix(2), |at| at.j < 2),
        Case::new("key_lengths", Mask::key_lengths(&lengths), move |at| at.j < lengths[at.b]),
        Case::new("from_tensor", Mask::from_tensor(&tensor).unwrap(), entry),
    ];
    samples.extend(documents(shape).into_iter().skip(3).step_by(4));
    samples
}

fn combinations(shape: Shape) -> Vec<Case> {
    let samples = samples(shape);
    let mut cases = Vec::new();
    for a in &samples {
        for b in &samples {
            cases.extend([a.and(b), a.or(b)]);
        }
    }
    let [_, causal, window, prefix, lengths, table, ..] = &samples[..] else { unreachable!("six samples at least") };
    cases.push(causal.or(prefix).and(lengths).or(&window.and(table)));
    cases.push(lengths.and(&causal.or(&prefix.and(table))).and(&window.or(causal)));
    cases
}

/// Masks with an offset of the first query: simple masks and a nested combination.
fn with_offset(shape: Shape) -> Vec<Case> {
    let mut cases = Vec::new();
    for offset in [0, 1, 3, 7, -1, -3] {
        let query = move |at: Score| at.i as i64 + offset;
        let causal = Case::new("causal", Mask::causal().with_offset(offset), move |at| at.key() <= query(at));
        let narrow = within(Some(1), Some(1));
        let window = Mask::window(Some(1), Some(1)).with_offset(offset);
        let window = Case::new("window", window, move |at| narrow(query(at), at.key()));
        let prefix = Case::new("prefix", Mask::prefix(2).with_offset(offset), |at| at.j < 2);
        cases.extend([causal.clone(), window.clone(), prefix.clone()]);

        let mut nest = causal.or(&prefix).and(&window);
        nest.mask = ((Mask::causal() | Mask::prefix(2)) & Mask::window(Some(1), Some(1))).with_offset(offset);
        cases.push(nest);
        let halves = vec![shape.kv_len / 2, shape.kv_len - shape.kv_len / 2];
        let mask = (Mask::documents(&halves) & Mask::causal()).with_offset(offset);
        let allows = move |at| in_same_document(&halves, query(at), at.key()) && at.key() <= query(at);
        cases.push(Case::new("documents & causal", mask, allows));
        // The offset that is set last counts.
        let twice = Mask::causal().with_offset(4).with_offset(offset);
        cases.push(Case::new("twice", twice, move |at| (causal.allows)(at)));
    }
    for case in &mut cases {
        case.name += ".with_offset";
    }
    cases
}

/// Masks with keys at the end to which every query may attend, or none: alone and in combinations.
fn with_extra_keys(shape: Shape) -> Vec<Case> {
    let mut cases = Vec::new();
    for count in (0..=2).filter(|&count| count <= shape.kv_len) {
        let before = Shape { kv_len: shape.kv_len - count, ..shape };
        let every_third = |cases: Vec<Case>| cases.into_iter().step_by(3);
        let inner = samples(before).into_iter().chain(every_third(bands())).chain(every_third(with_offset(before)));
        for case in inner {
            let Case { name, mask, allows } = case;
            for visible in [true, false] {
                let (name, mask, allows) = (name.clone(), mask.clone(), allows.clone());
                let (name, mask) = match visible {
                    true => (format!("{name}.with_extra_keys({count})"), mask.with_extra_keys(count)),
                    false => (format!("{name}.with_hidden_keys({count})"), mask.with_hidden_keys(count)),
                };
                let allows =
                    move |at: Score| if at.j < before.kv_len { allows(Score { shape: before, ..at }) } else { visible };
                cases.push(Case::new(name, mask, allows));
            }
        }
    }
    let window =
        Case::new("window", Mask::window(Some(1), Some(0)), |at| within(Some(1), Some(0))(at.query(), at.key()));
    let combined: Vec<Case> = cases.iter().step_by(3).flat_map(|case| [case.and(&window), case.or(&window)]).collect();
    cases.extend(combined);
    cases
}

/// Masks with a separate offset for each sequence.
fn with_offsets(shape: Shape) -> Vec<Case> {
    let mut cases = Vec::new();
    for offsets in [[0, 2], [3, 1], [7, -2], [-1, 2]] {
        let query = move |at: Score| at.i as i64 + offsets[at.b];
        let offsets = &offsets[..shape.batch];
        let causal = Mask::causal().with_offsets(offsets);
        let causal = Case::new("causal", causal, move |at| at.key() <= query(at));
        let sliding = Mask::sliding_window(2).with_offset(5).with_offsets(offsets);
        let sliding = Case::new("sliding", sliding, move |at| at.key() <= query(at) && query(at) - at.key() < 2);
        let lengths = Case::new("lengths", Mask::prefix(2).with_offsets(offsets), |at| at.j < 2);

        let mut nest = causal.or(&lengths).and(&sliding);
        nest.mask = ((Mask::causal() | Mask::prefix(2)) & Mask::sliding_window(2)).with_offsets(offsets);
        let halves = vec![shape.kv_len / 2, shape.kv_len - shape.kv_len / 2];
        let mask = (Mask::documents(&halves) & Mask::causal()).with_offsets(offsets);
        let allows = move |at| in_same_document(&halves, query(at), at.key()) && at.key() <= query(at);
        cases.push(Case::new("documents & causal", mask, allows));
        // The offset that is set last counts.
        let same = Mask::causal().with_offsets(offsets).with_offset(1);
        cases.push(Case::new("one for all", same, |at| at.j < at.i + 2));
        cases.extend([causal, sliding, lengths, nest]);
    }
    for case in &mut cases {
        case.name += ".with_offsets";
    }
    cases
}
