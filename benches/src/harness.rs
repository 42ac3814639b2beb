//! Interleaved measurement: A B A B …, so that the drift of a noisy machine hits every contender alike.
//!
//! A *contender* is one way of doing the same work. Each round runs every contender once, in an order that rotates with the
//! round; the first rounds warm caches and are thrown away. A contender that fails stops the whole run: a series with holes
//! would compare different things.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use indicatif::{ProgressBar, ProgressStyle};

/// One run's figures by name; a name ends in its unit.
pub type Figures = BTreeMap<String, f64>;

/// One way of doing the work under test.
pub struct Contender<'a> {
    pub name: String,
    pub run: Box<dyn FnMut() -> Result<Figures> + 'a>,
}

/// Every sample of every figure of every contender: contender → figure → samples in order.
pub type Series = BTreeMap<String, BTreeMap<String, Vec<f64>>>;

/// Run all contenders `rounds` times after `warmup` rounds.
///
/// # Errors
/// The first failure of any contender, with its name and round.
pub fn interleave(contenders: &mut [Contender<'_>], warmup: u32, rounds: u32) -> Result<Series> {
    let bar = ProgressBar::new(u64::from(warmup + rounds)).with_style(
        ProgressStyle::with_template("{bar:40} {pos}/{len} rounds, {eta} left")
            .context("the progress bar's template is wrong")?,
    );
    let mut series = Series::new();
    for round in 0..warmup + rounds {
        let width = contenders.len().max(1);
        let shift = usize::try_from(round).unwrap_or(0) % width;
        for offset in 0..contenders.len() {
            let contender = &mut contenders[(shift + offset) % width];
            let figures = (contender.run)()
                .with_context(|| format!("contender {} failed in round {round}", contender.name))?;
            if round < warmup {
                continue;
            }
            let entry = series.entry(contender.name.clone()).or_default();
            for (name, value) in figures {
                entry.entry(name).or_default().push(value);
            }
        }
        bar.inc(1);
    }
    bar.finish_and_clear();
    Ok(series)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn warm_up_rounds_are_dropped_and_order_rotates() {
        let order = std::cell::RefCell::new(String::new());
        let contender = |name: &'static str| Contender {
            name: name.to_owned(),
            run: Box::new(|| {
                order.borrow_mut().push_str(name);
                Ok(Figures::from([("total".to_owned(), 1.0)]))
            }),
        };
        let series = interleave(&mut [contender("a"), contender("b")], 1, 2).unwrap();
        assert_eq!(series["a"]["total"].len(), 2);
        assert_eq!(*order.borrow(), "abbaab");
    }

    #[test]
    fn a_failing_contender_is_named() {
        let mut contenders = [Contender {
            name: "bad".into(),
            run: Box::new(|| anyhow::bail!("no")),
        }];
        let error = interleave(&mut contenders, 0, 1).unwrap_err();
        assert!(format!("{error:#}").contains("contender bad failed in round 0"));
    }
}
