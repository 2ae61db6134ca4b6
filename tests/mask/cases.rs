//! Every constructor and many combinations, each beside its definition in closed form.

use std::rc::Rc;

use candle_attention::{Mask, ScoreShape};
use candle_core::{DType, Device, Tensor};

use crate::common::Random;

/// One score: the sizes, and (sequence, head, query, key).
#[derive(Clone, Copy)]
pub struct Place {
    pub shape: ScoreShape,
    pub b: usize,
    pub h: usize,
    pub i: usize,
    pub j: usize,
}

impl Place {
    /// Where the query stands: the last one at the last key.
    fn query(&self) -> i64 {
        self.i as i64 + self.shape.kv_len as i64 - self.shape.q_len as i64
    }

    fn key(&self) -> i64 {
        self.j as i64
    }
}

/// A mask and what it should let through.
#[derive(Clone)]
pub struct Case {
    pub name: String,
    pub mask: Mask,
    pub allows: Rc<dyn Fn(Place) -> bool>,
    /// Whether [`Mask::tile`] must tell a uniform tile from a mixed one.
    pub exact: bool,
}

impl Case {
    fn exact(name: impl Into<String>, mask: Mask, allows: impl Fn(Place) -> bool + 'static) -> Self {
        let (name, allows, exact) = (name.into(), Rc::new(allows), true);
        Self { name, mask, allows, exact }
    }

    fn coarse(name: impl Into<String>, mask: Mask, allows: impl Fn(Place) -> bool + 'static) -> Self {
        let exact = false;
        Self { exact, ..Self::exact(name, mask, allows) }
    }

    fn and(&self, other: &Self) -> Self {
        let (a, b) = (self.allows.clone(), other.allows.clone());
        let name = format!("({} & {})", self.name, other.name);
        Self::coarse(name, self.mask.clone() & other.mask.clone(), move |at| a(at) && b(at))
    }

    fn or(&self, other: &Self) -> Self {
        let (a, b) = (self.allows.clone(), other.allows.clone());
        let name = format!("({} | {})", self.name, other.name);
        Self::coarse(name, self.mask.clone() | other.mask.clone(), move |at| a(at) || b(at))
    }
}

/// All sizes: 0 to 5 queries and keys, one or two sequences and heads.
pub fn shapes() -> Vec<ScoreShape> {
    let mut shapes = Vec::new();
    for (batch, num_heads) in [(1, 1), (2, 1), (1, 2), (2, 2)] {
        for q_len in 0..=5 {
            shapes.extend((0..=5).map(|kv_len| ScoreShape::from((batch, num_heads, q_len, kv_len))));
        }
    }
    shapes
}

/// Every case that fits scores of this shape.
pub fn all(shape: ScoreShape) -> Vec<Case> {
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
    let causal = Case::exact("causal", Mask::causal(), |at| at.key() <= at.query());
    let mut cases = vec![Case::exact("full", Mask::full(), |_| true), causal];
    let sides = [None, Some(0), Some(1), Some(2), Some(6), Some(usize::MAX)];
    for left in sides {
        for right in sides {
            let allows = within(left, right);
            let name = format!("window({left:?}, {right:?})");
            let mask = Mask::window(left, right);
            cases.push(Case::exact(name, mask, move |at| allows(at.query(), at.key())));
        }
    }
    for width in [0, 1, 2, 3, 6, usize::MAX] {
        let allows = move |at: Place| at.key() <= at.query() && ((at.query() - at.key()) as usize) < width;
        cases.push(Case::exact(format!("sliding_window({width})"), Mask::sliding_window(width), allows));
    }
    cases
}

fn key_lengths(shape: ScoreShape) -> Vec<Case> {
    let mut cases = Vec::new();
    for first in 0..=shape.kv_len {
        let lengths = [first, shape.kv_len - first][..shape.batch].to_vec();
        let (name, mask) = (format!("key_lengths({lengths:?})"), Mask::key_lengths(&lengths));
        cases.push(Case::exact(name, mask, move |at| at.j < lengths[at.b]));
    }
    for len in [0, 1, 3, 6, usize::MAX] {
        cases.push(Case::exact(format!("prefix({len})"), Mask::prefix(len), move |at| at.j < len));
    }
    cases
}

/// Whether the places `a` and `b` lie in one of the stretches of these lengths.
fn together(lengths: &[usize], a: i64, b: i64) -> bool {
    let mut start = 0;
    lengths.iter().any(|&len| {
        let stretch = start..start + len as i64;
        start = stretch.end;
        stretch.contains(&a) && stretch.contains(&b)
    })
}

/// `kv_len` keys shared out over documents, some of them empty.
fn partitions(kv_len: usize) -> Vec<Vec<usize>> {
    let mut partitions = vec![vec![1; kv_len], vec![0, kv_len, 0]];
    partitions.extend((0..=kv_len).map(|first| vec![first, 0, kv_len - first]));
    partitions
}

/// One document for each key, in no order, a row for each sequence.
fn document_ids(shape: ScoreShape, seed: u64) -> Vec<Vec<u32>> {
    let mut random = Random::new(seed);
    let mut row = || (0..shape.kv_len).map(|_| random.below(3) as u32).collect();
    (0..shape.batch).map(|_| row()).collect()
}

fn documents(shape: ScoreShape) -> Vec<Case> {
    if shape.q_len > shape.kv_len {
        return Vec::new();
    }
    let mut cases = Vec::new();
    for lengths in partitions(shape.kv_len) {
        let (name, mask) = (format!("documents({lengths:?})"), Mask::documents(&lengths));
        cases.push(Case::coarse(name, mask, move |at| together(&lengths, at.query(), at.key())));
    }
    for seed in 0..3 {
        let ids = document_ids(shape, seed);
        let (name, mask) = (format!("document_ids({ids:?})"), Mask::document_ids(&ids));
        cases.push(Case::coarse(name, mask, move |at| ids[at.b][at.j] == ids[at.b][at.query() as usize]));
    }
    cases
}

/// A random boolean tensor (of one of the integer dtypes), and what it says of (sequence, head, query, key).
fn table(dims: &[usize], seed: u64) -> (Tensor, impl Fn(Place) -> bool + Clone + 'static) {
    let mut random = Random::new(seed);
    let values: Vec<i64> = (0..dims.iter().product()).map(|_| random.below(3) as i64 - 1).collect();
    // -1 counts as true, wherever the dtype has it.
    let (dtype, dims) = ([DType::U8, DType::U32, DType::I64][seed as usize % 3], dims.to_vec());
    let stored = values.iter().map(|x| if dtype == DType::I64 { *x } else { x.abs() }).collect();
    let tensor = Tensor::from_vec(stored, dims.clone(), &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
    let says = move |at: Place| {
        let place = [at.b, at.h, at.i, at.j];
        let mut index = 0;
        for (axis, &dim) in dims.iter().enumerate() {
            let along = place[axis + 4 - dims.len()];
            index = index * dim + if dim == 1 { 0 } else { along };
        }
        values[index] != 0
    };
    (tensor, says)
}

fn tables(shape: ScoreShape) -> Vec<Case> {
    let sizes = [shape.batch, shape.num_heads, shape.q_len, shape.kv_len];
    let mut cases = Vec::new();
    for kept in 0..16usize {
        let dims: Vec<usize> = (0..4).map(|axis| if kept >> axis & 1 == 1 { sizes[axis] } else { 1 }).collect();
        for rank in 2..=4 {
            let dims = &dims[4 - rank..];
            let (tensor, says) = table(dims, kept as u64);
            let mask = Mask::from_tensor(&tensor).unwrap();
            cases.push(Case::exact(format!("from_tensor({dims:?})"), mask, says.clone()));
            let mask = Mask::from_blocked(&tensor).unwrap();
            cases.push(Case::exact(format!("from_blocked({dims:?})"), mask, move |at| !says(at)));
        }
    }
    let (padding, says) = table(&[shape.batch, 1, 1, shape.kv_len], 5);
    let mask = Mask::from_padding_mask(&padding.reshape((shape.batch, shape.kv_len)).unwrap()).unwrap();
    cases.push(Case::exact("from_padding_mask", mask, move |at| !says(at)));
    cases
}

/// One or two of each kind, to be combined.
fn samples(shape: ScoreShape) -> Vec<Case> {
    let sizes = [shape.batch, shape.num_heads, shape.q_len, shape.kv_len];
    let (tensor, says) = table(&sizes, 8);
    let lengths = [shape.kv_len / 2, shape.kv_len][..shape.batch].to_vec();
    let mut samples = vec![
        Case::exact("full", Mask::full(), |_| true),
        Case::exact("causal", Mask::causal(), |at| at.key() <= at.query()),
        Case::exact("window", Mask::window(Some(1), Some(2)), |at| within(Some(1), Some(2))(at.query(), at.key())),
        Case::exact("prefix", Mask::prefix(2), |at| at.j < 2),
        Case::exact("key_lengths", Mask::key_lengths(&lengths), move |at| at.j < lengths[at.b]),
        Case::exact("from_tensor", Mask::from_tensor(&tensor).unwrap(), says),
    ];
    samples.extend(documents(shape).into_iter().skip(3).step_by(4));
    samples
}

fn combinations(shape: ScoreShape) -> Vec<Case> {
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

/// The first query at a place of its own, in a part alone and in a nest of parts.
fn with_offset(shape: ScoreShape) -> Vec<Case> {
    let mut cases = Vec::new();
    for offset in [0, 1, 3, 7] {
        let query = move |at: Place| (at.i + offset) as i64;
        let causal = Case::exact("causal", Mask::causal().with_offset(offset), move |at| at.key() <= query(at));
        let narrow = within(Some(1), Some(1));
        let window = Mask::window(Some(1), Some(1)).with_offset(offset);
        let window = Case::exact("window", window, move |at| narrow(query(at), at.key()));
        let prefix = Case::exact("prefix", Mask::prefix(2).with_offset(offset), |at| at.j < 2);
        cases.extend([causal.clone(), window.clone(), prefix.clone()]);

        let mut nest = causal.or(&prefix).and(&window);
        nest.mask = ((Mask::causal() | Mask::prefix(2)) & Mask::window(Some(1), Some(1))).with_offset(offset);
        cases.push(nest);
        if offset + shape.q_len <= shape.kv_len {
            let lengths = vec![shape.kv_len / 2, shape.kv_len - shape.kv_len / 2];
            let mask = (Mask::documents(&lengths) & Mask::causal()).with_offset(offset);
            let allows = move |at| together(&lengths, query(at), at.key()) && at.key() <= query(at);
            cases.push(Case::coarse("documents & causal", mask, allows));
        }
        // The last word counts.
        let twice = Mask::causal().with_offset(4).with_offset(offset);
        cases.push(Case::exact("twice", twice, move |at| (causal.allows)(at)));
    }
    for case in &mut cases {
        case.name += ".with_offset";
    }
    cases
}

/// Masks of the keys before the last ones, which everybody sees; alone and in a combination.
fn with_extra_keys(shape: ScoreShape) -> Vec<Case> {
    let mut cases = Vec::new();
    for count in (0..=2).filter(|&count| count <= shape.kv_len) {
        let before = ScoreShape { kv_len: shape.kv_len - count, ..shape };
        let every_third = |cases: Vec<Case>| cases.into_iter().step_by(3);
        let inner = samples(before).into_iter().chain(every_third(bands())).chain(every_third(with_offset(before)));
        for case in inner {
            let Case { name, mask, allows, exact } = case;
            let (name, mask) = (format!("{name}.with_extra_keys({count})"), mask.with_extra_keys(count));
            let allows = move |at: Place| at.j >= before.kv_len || allows(Place { shape: before, ..at });
            cases.push(Case { exact, ..Case::exact(name, mask, allows) });
        }
    }
    let window =
        Case::exact("window", Mask::window(Some(1), Some(0)), |at| within(Some(1), Some(0))(at.query(), at.key()));
    let combined: Vec<Case> = cases.iter().flat_map(|case| [case.and(&window), case.or(&window)]).collect();
    cases.extend(combined);
    cases
}

/// The first query of each sequence at a place of its own.
fn with_offsets(shape: ScoreShape) -> Vec<Case> {
    let mut cases = Vec::new();
    for offsets in [[0, 2], [3, 1], [7, 0], [2, 2]] {
        let query = move |at: Place| (at.i + offsets[at.b]) as i64;
        let offsets = &offsets[..shape.batch];
        let causal = Mask::causal().with_offsets(offsets);
        let causal = Case::exact("causal", causal, move |at| at.key() <= query(at));
        let sliding = Mask::sliding_window(2).with_offset(5).with_offsets(offsets);
        let sliding = Case::exact("sliding", sliding, move |at| at.key() <= query(at) && query(at) - at.key() < 2);
        let lengths = Case::exact("lengths", Mask::prefix(2).with_offsets(offsets), |at| at.j < 2);

        let mut nest = causal.or(&lengths).and(&sliding);
        nest.mask = ((Mask::causal() | Mask::prefix(2)) & Mask::sliding_window(2)).with_offsets(offsets);
        if offsets.iter().all(|offset| offset + shape.q_len <= shape.kv_len) {
            let lengths = vec![shape.kv_len / 2, shape.kv_len - shape.kv_len / 2];
            let mask = (Mask::documents(&lengths) & Mask::causal()).with_offsets(offsets);
            let allows = move |at| together(&lengths, query(at), at.key()) && at.key() <= query(at);
            cases.push(Case::coarse("documents & causal", mask, allows));
        }
        // The last word counts.
        let same = Mask::causal().with_offsets(offsets).with_offset(1);
        cases.push(Case::exact("one for all", same, |at| at.j < at.i + 2));
        cases.extend([causal, sliding, lengths, nest]);
    }
    for case in &mut cases {
        case.name += ".with_offsets";
    }
    cases
}
