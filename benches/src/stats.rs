//! Order statistics and a rank test for small, noisy series.
//!
//! Nothing here assumes a normal distribution: boot times have long right tails. Percentiles are those of the sample
//! (nearest rank); two series are compared by the Mann-Whitney U test with the normal approximation and tie correction
//! (Mann & Whitney 1947), which holds from about eight samples a side.

use serde::Serialize;

/// Summary of one series, in the unit of its samples.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Summary {
    pub count: usize,
    pub min: f64,
    pub p50: f64,
    pub p90: f64,
    pub p99: f64,
    pub max: f64,
}

/// How series A compares with series B of the same run.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Comparison {
    /// p50 of A over p50 of B: below 1, A is the smaller.
    pub p50_ratio: f64,
    /// p99 of A over p99 of B.
    pub p99_ratio: f64,
    /// Two-sided p value of the Mann-Whitney U test.
    pub p_value: f64,
}

/// Nearest-rank percentile of a sorted, non-empty series.
fn percentile(sorted: &[f64], percent: usize) -> f64 {
    let rank = (percent * sorted.len()).div_ceil(100).clamp(1, sorted.len());
    sorted[rank - 1]
}

/// `None` for an empty series.
pub fn summary(samples: &[f64]) -> Option<Summary> {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    Some(Summary {
        count: sorted.len(),
        min: *sorted.first()?,
        p50: percentile(&sorted, 50),
        p90: percentile(&sorted, 90),
        p99: percentile(&sorted, 99),
        max: *sorted.last()?,
    })
}

/// `None` where either series is empty.
pub fn compare(a: &[f64], b: &[f64]) -> Option<Comparison> {
    let (sa, sb) = (summary(a)?, summary(b)?);
    Some(Comparison {
        p50_ratio: sa.p50 / sb.p50,
        p99_ratio: sa.p99 / sb.p99,
        p_value: mann_whitney(a, b),
    })
}

/// Two-sided p value for "both series come from one distribution".
fn mann_whitney(a: &[f64], b: &[f64]) -> f64 {
    let mut all: Vec<(f64, bool)> = a
        .iter()
        .map(|&x| (x, true))
        .chain(b.iter().map(|&x| (x, false)))
        .collect();
    all.sort_by(|x, y| x.0.total_cmp(&y.0));
    let (na, nb) = (count(a.len()), count(b.len()));
    let n = na + nb;
    let (mut rank_sum, mut ties, mut at) = (0.0, 0.0, 0);
    while at < all.len() {
        let mut end = at;
        while end < all.len() && all[end].0 == all[at].0 {
            end += 1;
        }
        // Tied samples share the mean of the ranks they span; ranks count from 1.
        let mean_rank = count(at + end + 1) / 2.0;
        rank_sum += mean_rank * count(all[at..end].iter().filter(|(_, from_a)| *from_a).count());
        let tied = count(end - at);
        ties += tied.powi(3) - tied;
        at = end;
    }
    let u = rank_sum - na * (na + 1.0) / 2.0;
    let variance = na * nb / 12.0 * ((n + 1.0) - ties / (n * (n - 1.0)));
    if variance <= 0.0 {
        return 1.0;
    }
    // Continuity correction of one half.
    let z = ((u - na * nb / 2.0).abs() - 0.5).max(0.0) / variance.sqrt();
    (2.0 * upper_tail(z)).min(1.0)
}

fn count(n: usize) -> f64 {
    f64::from(u32::try_from(n).unwrap_or(u32::MAX))
}

/// P(Z > z) of the standard normal, for z ≥ 0 (Abramowitz & Stegun 26.2.17, error below 7.5e-8).
fn upper_tail(z: f64) -> f64 {
    let t = 1.0 / (1.0 + 0.231_641_9 * z);
    let poly = t
        * (0.319_381_530
            + t * (-0.356_563_782 + t * (1.781_477_937 + t * (-1.821_255_978 + t * 1.330_274_429))));
    (-z * z / 2.0).exp() / (2.0 * std::f64::consts::PI).sqrt() * poly
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_samples_and_the_empty_series_has_none() {
        assert_eq!(summary(&[]), None);
        let s = summary(&[5.0, 1.0, 4.0, 2.0, 3.0]).unwrap();
        assert_eq!((s.min, s.p50, s.p90, s.p99, s.max), (1.0, 3.0, 5.0, 5.0, 5.0));
        let one = summary(&[7.0]).unwrap();
        assert_eq!((one.p50, one.p99), (7.0, 7.0));
    }

    #[test]
    fn equal_series_do_not_differ_and_apart_series_do() {
        let a: Vec<f64> = (0..40).map(f64::from).collect();
        let far: Vec<f64> = (100..140).map(f64::from).collect();
        assert!(compare(&a, &a).unwrap().p_value > 0.9);
        assert!(compare(&a, &far).unwrap().p_value < 1e-9);
        assert!(compare(&[1.0; 20], &[1.0; 20]).unwrap().p_value >= 1.0);
    }

    #[test]
    fn p_value_agrees_with_a_published_example() {
        // Series of ten a side with U = 23.5: z = 1.965 with the correction, p = 0.049.
        let a = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0];
        let b = [4.5, 5.5, 6.5, 7.5, 8.5, 9.5, 10.5, 11.5, 12.5, 13.5];
        let p = mann_whitney(&a, &b);
        assert!((0.01..0.1).contains(&p), "{p}");
    }
}
