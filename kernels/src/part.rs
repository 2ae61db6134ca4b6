//! [`Part`]: some of the scores of a larger problem.

use std::ops::Range;

use crate::alloc::product;
use crate::error::Error;
use crate::mask::ScoreShape;

/// Where the scores of a problem stand among those of a larger one, the whole, of which they are some sequences, heads, queries
/// and keys. What depends on places is that of the whole: mask, bias, distances, and which weights are dropped.
///
/// # Examples
///
/// ```
/// use attention_kernels::mask::{Rule, ScoreShape};
/// use attention_kernels::{Layout, Part, Problem, ProblemOptions, View, forward};
///
/// // Queries 2 and 3 of a causal sequence, and its keys 1 to 3: query 2 doesn't see key 3.
/// let causal = Rule::Band { below: None, above: Some(0), offset: None };
/// let part = Part { whole: ScoreShape { batch: 1, num_heads: 1, q_len: 4, kv_len: 4 }, first: [0, 0, 2, 1] };
/// let (q, kv) = ([0.0f64; 2], [1.0, 2.0, 6.0]);
/// let view = |data, len| View::new("test", data, [len, len, 1], [1, 1, len, 1]);
/// let options = ProblemOptions { mask: &causal, part: Some(part), ..Default::default() };
/// let problem = Problem::new(view(&q, 2)?, view(&kv, 3)?, view(&kv, 3)?, options)?;
/// assert_eq!(forward(&problem, Layout::HeadsFirst)?.context[0], 1.5);
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// The sizes of the whole.
    pub whole: ScoreShape,
    /// Its first sequence, head, query and key.
    pub first: [usize; 4],
}

/// The numbers of a problem's heads among those of a larger attention, whose heads several ranks share. Which weights are dropped depends
/// on them, and nothing else does: mask, bias and slopes are those of the problem's own heads.
///
/// # Examples
///
/// ```
/// use attention_kernels::{Dropout, HeadNumbers, Layout, Problem, ProblemOptions, View, forward};
///
/// let numbers: Vec<f64> = (0..2 * 8).map(|i| f64::from(i % 5)).collect();
/// let dropout = Some(Dropout { p: 0.5, seed: 7, first: 0 });
/// let context = |heads: std::ops::Range<usize>| {
///     let view = |data| View::new("test", data, [16, 8, 1], [1, heads.len(), 8, 1]);
///     let own = &numbers[heads.start * 8..heads.end * 8];
///     let options = ProblemOptions { dropout, heads: Some(HeadNumbers { first: heads.start, count: 2 }), ..Default::default() };
///     let problem = Problem::new(view(own)?, view(own)?, view(own)?, options)?;
///     Ok::<_, attention_kernels::Error>(forward(&problem, Layout::HeadsFirst)?.context)
/// };
/// assert_eq!(context(0..2)?[8..], context(1..2)?);
/// # Ok::<(), attention_kernels::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeadNumbers {
    /// The number of the first one.
    pub first: usize,
    /// How many heads the larger attention has.
    pub count: usize,
}

impl HeadNumbers {
    pub(crate) fn check(self, shape: &ScoreShape) -> Result<(), Error> {
        if self.first.checked_add(shape.num_heads).is_some_and(|end| end <= self.count) {
            // The heads of all sequences can be counted.
            return product("heads of the larger attention", &[shape.batch, self.count]).map(|_| ());
        }
        let expected = format!("at most {} heads from number {} on", self.count, self.first);
        let got = [shape.batch, shape.num_heads, shape.q_len, shape.kv_len];
        Err(Error::Dims { what: "numbers of the heads", expected, got })
    }
}

impl Part {
    /// All scores of a problem.
    pub(crate) fn all_of(whole: ScoreShape) -> Self {
        Self { whole, first: [0; 4] }
    }

    /// This part, if the whole has scores of this shape there.
    pub(crate) fn check(self, shape: &ScoreShape) -> Result<Self, Error> {
        let sizes = |shape: &ScoreShape| [shape.batch, shape.num_heads, shape.q_len, shape.kv_len];
        let ends = self.first.iter().zip(sizes(shape)).map(|(first, size)| first.checked_add(size));
        if ends.zip(sizes(&self.whole)).all(|(end, whole)| end.is_some_and(|end| end <= whole)) {
            // Rows of the whole, and distances between its queries and keys, can be counted.
            let ScoreShape { batch, num_heads, q_len, kv_len } = self.whole;
            product("scores of the whole", &[batch, num_heads, q_len.max(kv_len)])?;
            return Ok(self);
        }
        let expected = format!("scores of the whole {:?} from {:?} on", sizes(&self.whole), self.first);
        Err(Error::Dims { what: "part", expected, got: sizes(shape) })
    }

    /// A sequence and a head of the part as those of the whole.
    #[inline(always)]
    pub(crate) fn at(&self, (b, h): (usize, usize)) -> (usize, usize) {
        (self.first[0] + b, self.first[1] + h)
    }

    #[inline(always)]
    pub(crate) fn queries(&self, queries: &Range<usize>) -> Range<usize> {
        self.first[2] + queries.start..self.first[2] + queries.end
    }

    #[inline(always)]
    pub(crate) fn keys(&self, keys: &Range<usize>) -> Range<usize> {
        self.first[3] + keys.start..self.first[3] + keys.end
    }

    /// The number of a head among those of all sequences of the whole.
    #[inline(always)]
    pub(crate) fn row(&self, at: (usize, usize)) -> usize {
        let (b, h) = self.at(at);
        b * self.whole.num_heads + h
    }
}
