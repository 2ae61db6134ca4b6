//! A small set of cases that contains every pair of values of every two axes. Most bugs that need a combination of
//! values need only two of them.
//!
//! The method is greedy, as in Cohen, Dalal, Fredman, Patton, "The AETG System" (IEEE TSE 1997), without its random
//! trials.

/// One case: the index of a value on each axis; `None` if it hasn't been chosen yet.
type Partial = Vec<Option<usize>>;

/// Two axes and a value on each.
type Pair = [(usize, usize); 2];

/// Cases, as indices of values on axes of these sizes, such that every pair of values of every two axes occurs in one,
/// unless `fits` refuses it. `fits` sees unfinished cases, and may not refuse all the values of an axis.
pub fn pairwise(sizes: &[usize], fits: impl Fn(&[Option<usize>]) -> bool) -> Vec<Vec<usize>> {
    let mut left: Vec<Pair> = all_pairs(sizes).into_iter().filter(|pair| fits(&start(sizes, pair))).collect();
    let mut cases = Vec::new();
    while let Some(pair) = left.first() {
        let mut case = start(sizes, pair);
        for axis in 0..sizes.len() {
            if case[axis].is_none() {
                // If several values are equally good, they take turns.
                let turns = (0..sizes[axis]).map(|value| (value + cases.len()) % sizes[axis]);
                let tried = turns.map(|value| with(&case, axis, value)).filter(|case| fits(case));
                case = tried
                    .reduce(|best, case| if gain(&left, &case) > gain(&left, &best) { case } else { best })
                    .unwrap();
            }
        }
        left.retain(|pair| !holds(&case, pair));
        cases.push(case.into_iter().flatten().collect());
    }
    cases
}

fn all_pairs(sizes: &[usize]) -> Vec<Pair> {
    let mut pairs = Vec::new();
    for (b, &b_size) in sizes.iter().enumerate() {
        for (a, &a_size) in sizes[..b].iter().enumerate() {
            pairs.extend((0..a_size).flat_map(|x| (0..b_size).map(move |y| [(a, x), (b, y)])));
        }
    }
    pairs
}

fn start(sizes: &[usize], [(a, x), (b, y)]: &Pair) -> Partial {
    with(&with(&vec![None; sizes.len()], *a, *x), *b, *y)
}

fn with(case: &Partial, axis: usize, value: usize) -> Partial {
    let mut case = case.clone();
    case[axis] = Some(value);
    case
}

fn holds(case: &Partial, pair: &Pair) -> bool {
    pair.iter().all(|&(axis, value)| case[axis] == Some(value))
}

/// How many of the pairs that are left a case would cover.
fn gain(left: &[Pair], case: &Partial) -> usize {
    left.iter().filter(|pair| holds(case, pair)).count()
}

#[test]
fn every_pair_that_fits_occurs() {
    let sizes = [4, 3, 2, 5];
    let fits = |case: &[Option<usize>]| case[0] != Some(1) || case[3] != Some(4);
    let cases = pairwise(&sizes, fits);
    for pair in all_pairs(&sizes) {
        let occurs = cases.iter().any(|case| pair.iter().all(|&(axis, value)| case[axis] == value));
        assert_eq!(occurs, pair != [(0, 1), (3, 4)], "{pair:?}");
    }
    assert!(cases.len() < 40, "{} cases, of 120", cases.len());
}
