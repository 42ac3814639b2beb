//! The live view.
//!
//! Two threads: one looks at the microVMs, however long that takes; this one draws the latest figures and answers keys at
//! once. The terminal is left as it was found, whichever way the view ends.

use std::{
    sync::mpsc::{self, Receiver, RecvTimeoutError, SyncSender},
    time::{Duration, Instant},
};

use anyhow::Context as _;
use ratatui::{
    Frame,
    crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers},
    layout::{Constraint, Layout},
    style::{Modifier, Style},
    text::Line,
    widgets::{Cell, Row as TableRow, Table, TableState},
};

use super::table::{HEADER, Row, Sort, look};
use crate::sampler::{Sampler, binary_size};

/// Between the first look and the second: rates appear soon.
const FIRST_INTERVAL: Duration = Duration::from_millis(400);
/// How often this thread wakes up to see whether there are new figures.
const TICK: Duration = Duration::from_millis(250);

/// Of the columns of [`HEADER`]; the name takes what is left.
const WIDTHS: [Constraint; 10] = [
    Constraint::Min(12),
    Constraint::Length(8),
    Constraint::Length(7),
    Constraint::Length(7),
    Constraint::Length(9),
    Constraint::Length(10),
    Constraint::Length(7),
    Constraint::Length(7),
    Constraint::Length(6),
    Constraint::Length(8),
];

/// The columns a terminal has room for, the name always among them.
fn columns(width: u16) -> Vec<usize> {
    let dropped: &[usize] = match width {
        100.. => &[],
        80.. => &[1],
        60.. => &[1, 6, 7],
        _ => &[1, 3, 4, 6, 7, 9],
    };
    (0..HEADER.len())
        .filter(|column| !dropped.contains(column))
        .collect()
}

/// What is on the screen.
struct View {
    rows: Vec<Row>,
    sort: Sort,
    reverse: bool,
    selected: TableState,
    error: Option<String>,
}

/// What the looking thread says: lines, or why there are none.
type Looked = Result<Vec<Row>, String>;

/// Shows the view until somebody ends it.
///
/// # Errors
/// The terminal can't be drawn on.
pub(super) fn run(sampler: Sampler, delay: Duration) -> anyhow::Result<()> {
    let (sender, receiver) = mpsc::sync_channel(1);
    // Dropping this ends the thread's sleep, and with it the thread.
    let (stop, stopped) = mpsc::channel::<()>();
    let looking = std::thread::spawn(move || keep_looking(sampler, delay, &sender, &stopped));
    let mut terminal = ratatui::try_init().context("preparing the terminal")?;
    let result = View::new().show(&mut terminal, &receiver);
    ratatui::restore();
    drop(stop);
    drop(receiver);
    // A guest that doesn't answer may keep it for a while; nobody waits for that.
    drop(looking);
    result
}

fn keep_looking(mut sampler: Sampler, delay: Duration, sender: &SyncSender<Looked>, stopped: &Receiver<()>) {
    let mut pause = FIRST_INTERVAL;
    loop {
        let begin = Instant::now();
        let looked = look(&mut sampler)
            .map(|usages| usages.iter().map(Row::of).collect())
            .map_err(|error| format!("{error:#}"));
        if sender.send(looked).is_err() {
            return;
        }
        if stopped.recv_timeout(pause.saturating_sub(begin.elapsed())) != Err(RecvTimeoutError::Timeout) {
            return;
        }
        pause = delay;
    }
}

impl View {
    fn new() -> Self {
        Self {
            rows: Vec::new(),
            sort: Sort::Cpu,
            reverse: false,
            selected: TableState::default(),
            error: None,
        }
    }

    fn show(
        mut self,
        terminal: &mut ratatui::DefaultTerminal,
        receiver: &Receiver<Looked>,
    ) -> anyhow::Result<()> {
        loop {
            while let Ok(looked) = receiver.try_recv() {
                match looked {
                    Ok(rows) => (self.rows, self.error) = (rows, None),
                    Err(error) => self.error = Some(error),
                }
            }
            self.sort.apply(&mut self.rows, self.reverse);
            terminal
                .draw(|frame| self.draw(frame))
                .context("drawing on the terminal")?;
            if !event::poll(TICK).context("reading the keyboard")? {
                continue;
            }
            if let Event::Key(key) = event::read().context("reading the keyboard")?
                && key.kind == KeyEventKind::Press
                && !self.press(key.code, key.modifiers)
            {
                return Ok(());
            }
        }
    }

    /// Whether the view goes on.
    fn press(&mut self, key: KeyCode, modifiers: KeyModifiers) -> bool {
        let sort = match key {
            KeyCode::Char('c' | 'd') if modifiers.contains(KeyModifiers::CONTROL) => return false,
            KeyCode::Char('q') | KeyCode::Esc => return false,
            KeyCode::Char('c') => Sort::Cpu,
            KeyCode::Char('m') => Sort::Memory,
            KeyCode::Char('i') => Sort::Io,
            KeyCode::Char('p') => Sort::Pids,
            KeyCode::Char('u') => Sort::Uptime,
            KeyCode::Char('n') => Sort::Name,
            KeyCode::Char('r') => {
                self.reverse = !self.reverse;
                return true;
            }
            KeyCode::Down | KeyCode::Char('j') => {
                self.selected.select_next();
                return true;
            }
            KeyCode::Up | KeyCode::Char('k') => {
                self.selected.select_previous();
                return true;
            }
            KeyCode::PageDown => {
                self.selected.scroll_down_by(10);
                return true;
            }
            KeyCode::PageUp => {
                self.selected.scroll_up_by(10);
                return true;
            }
            _ => return true,
        };
        // The same key again turns the order round.
        self.reverse = sort == self.sort && !self.reverse;
        self.sort = sort;
        true
    }

    fn summary(&self) -> String {
        let running = self.rows.iter().filter(|row| row.status == "running").count();
        let cpu = self.rows.iter().fold(0.0, |sum, row| sum + row.cpu_percent);
        let sum = |of: fn(&Row) -> u64| self.rows.iter().map(of).fold(0, u64::saturating_add);
        format!(
            "{} microVMs, {running} running   CPU {cpu:.1}%   memory: {} given, {} taken",
            self.rows.len(),
            binary_size(sum(|row| row.memory_given_bytes)),
            binary_size(sum(|row| row.host_memory_bytes)),
        )
    }

    fn draw(&mut self, frame: &mut Frame<'_>) {
        let [summary, table, keys] =
            Layout::vertical([Constraint::Length(2), Constraint::Min(1), Constraint::Length(1)])
                .areas(frame.area());
        let text = self
            .error
            .as_ref()
            .map_or_else(|| self.summary(), |error| format!("hull: {error}"));
        frame.render_widget(Line::from(text), summary);
        let columns = columns(table.width);
        let header = TableRow::new(columns.iter().map(|column| {
            let arrow = match (*column == self.sort.column(), self.reverse) {
                (false, _) => "",
                (true, false) => " ▼",
                (true, true) => " ▲",
            };
            Cell::from(format!("{}{arrow}", HEADER[*column]))
        }))
        .style(Style::new().add_modifier(Modifier::REVERSED));
        let rows = self.rows.iter().map(|row| {
            let cells = row.cells();
            TableRow::new(
                columns
                    .iter()
                    .map(|column| cells[*column].clone())
                    .collect::<Vec<_>>(),
            )
        });
        let widths = columns.iter().map(|column| WIDTHS[*column]);
        let widget = Table::new(rows, widths)
            .header(header)
            .row_highlight_style(Style::new().add_modifier(Modifier::BOLD | Modifier::UNDERLINED));
        frame.render_stateful_widget(widget, table, &mut self.selected);
        let help = "q quit   sort by: c CPU, m memory, i I/O, p pids, u uptime, n name   r reverse";
        frame.render_widget(
            Line::from(help).style(Style::new().add_modifier(Modifier::DIM)),
            keys,
        );
    }
}

#[cfg(test)]
mod tests {
    use ratatui::{Terminal, backend::TestBackend};

    use super::*;
    use crate::top::table::tests::row;

    fn drawn(view: &mut View, width: u16) -> String {
        let mut terminal = Terminal::new(TestBackend::new(width, 8)).unwrap();
        terminal.draw(|frame| view.draw(frame)).unwrap();
        let buffer = terminal.backend().buffer();
        let cells = buffer.content().iter().map(|cell| cell.symbol().to_owned());
        cells
            .collect::<Vec<_>>()
            .chunks(usize::from(width))
            .map(|line| line.concat().trim_end().to_owned() + "\n")
            .collect()
    }

    #[test]
    fn screen_shows_microvms_and_their_sum() {
        let mut view = View::new();
        view.rows = vec![row("cache", 12.5, 30 << 20), row("web", 1.0, 10 << 20)];
        let text = drawn(&mut view, 110);
        assert!(text.contains("2 microVMs, 2 running   CPU 13.5%"), "{text}");
        assert!(text.contains("1GiB given, 40MiB taken"), "{text}");
        assert!(text.contains("CPU % ▼") && text.contains("cache"), "{text}");
    }

    #[test]
    fn narrow_terminal_is_drawn_on_as_well() {
        let mut view = View::new();
        view.rows = vec![row("cache", 12.5, 1)];
        for width in [1, 10] {
            drawn(&mut view, width);
        }
        for width in [40, 60, 80, 99, 100] {
            let text = drawn(&mut view, width);
            assert!(text.contains("cache") && text.contains("12.5"), "{width}: {text}");
        }
    }

    #[test]
    fn keys_sort_and_end() {
        let mut view = View::new();
        assert!(view.press(KeyCode::Char('m'), KeyModifiers::NONE));
        assert_eq!((view.sort, view.reverse), (Sort::Memory, false));
        assert!(view.press(KeyCode::Char('m'), KeyModifiers::NONE));
        assert!(view.reverse);
        assert!(view.press(KeyCode::Down, KeyModifiers::NONE));
        assert!(!view.press(KeyCode::Char('c'), KeyModifiers::CONTROL));
        assert!(!view.press(KeyCode::Char('q'), KeyModifiers::NONE));
    }
}
