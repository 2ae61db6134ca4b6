//! Random cases against attention in plain loops of f64, with numbers up to the ends of each dtype.

mod attention;
mod random;
mod rows;
