//! Matrices keep to their slices.

use super::*;

#[test]
fn rows_lie_a_stride_apart() {
    let data: Vec<u32> = (0..11).collect();
    let matrix = Matrix::new(&data, 3, 3, 4);
    assert_eq!(matrix.row(2), [8, 9, 10]);
    assert_eq!(matrix.skip(1).row(0), [4, 5, 6]);
    assert_eq!(matrix.skip(3).rows(), 0);
    assert_eq!(matrix.take(1).rows(), 1);
}

#[test]
fn written_rows_lie_a_stride_apart() {
    let mut data = vec![0; 11];
    let mut matrix = MatrixMut::new(&mut data, 3, 3, 4);
    (0..3).for_each(|r| matrix.row(r).fill(r + 1));
    matrix.part(1, 2).row(0)[1] = 9;
    assert_eq!(matrix.as_ref().row(1), [2, 9, 2]);
    assert_eq!(data, [1, 1, 1, 0, 2, 9, 2, 0, 3, 3, 3]);
}

#[test]
#[should_panic(expected = "lies inside its slice")]
fn matrix_beyond_its_slice_is_refused() {
    Matrix::new(&[0; 10], 3, 3, 4);
}

#[test]
#[should_panic(expected = "lies inside its slice")]
fn matrix_of_a_stride_beyond_memory_is_refused() {
    MatrixMut::new(&mut [0; 10], 3, 3, usize::MAX);
}

#[test]
#[should_panic(expected = "a row of the matrix")]
fn row_behind_the_last_is_refused() {
    Matrix::new(&[0; 10], 2, 3, 4).row(2);
}

#[test]
#[should_panic(expected = "no more rows")]
fn part_behind_the_last_row_is_refused() {
    MatrixMut::new(&mut [0; 10], 2, 3, 4).part(1, 2);
}

#[test]
#[should_panic(expected = "inside the result")]
fn rows_beyond_the_result_are_refused() {
    let mut data = [0; 10];
    let shared = Shared::new(&mut data);
    // SAFETY: there is only one result.
    unsafe { shared.rows(8, 1, 3, 3) };
}

/// Rows of two heads, token by token.
#[test]
fn tasks_write_interleaved_rows() {
    let mut data = [0; 12];
    let shared = Shared::new(&mut data);
    std::thread::scope(|scope| {
        for head in 0..2 {
            let shared = &shared;
            scope.spawn(move || {
                // SAFETY: the two heads have no element in common.
                let mut rows = unsafe { shared.rows(head * 2, 3, 2, 4) };
                (0..3).for_each(|r| rows.row(r).fill(head + 1));
            });
        }
    });
    assert_eq!(data, [1, 1, 2, 2, 1, 1, 2, 2, 1, 1, 2, 2]);
}
