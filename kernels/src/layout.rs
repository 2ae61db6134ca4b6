//! How a result's axes lie in memory.

/// The order of a result's axes in memory, which always is contiguous.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Layout {
    /// (batch, heads, len, dim): head by head.
    #[default]
    HeadsFirst,
    /// (batch, len, heads, dim): token by token, as projections give and take it.
    TokensFirst,
}

impl Layout {
    /// The strides of batch, heads and len of a tensor with dims (batch, heads, len, dim), as [`View::new`](crate::View::new)
    /// takes them.
    ///
    /// # Examples
    ///
    /// ```
    /// use attention_kernels::Layout;
    ///
    /// assert_eq!(Layout::HeadsFirst.strides([2, 3, 5, 7]), [3 * 5 * 7, 5 * 7, 7]);
    /// assert_eq!(Layout::TokensFirst.strides([2, 3, 5, 7]), [3 * 5 * 7, 7, 3 * 7]);
    /// ```
    pub fn strides(self, [_, heads, len, dim]: [usize; 4]) -> [usize; 3] {
        match self {
            Layout::HeadsFirst => [heads * len * dim, len * dim, dim],
            Layout::TokensFirst => [heads * len * dim, dim, heads * dim],
        }
    }
}
