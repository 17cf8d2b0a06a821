//! systemd's journal as a place for logs: a line for who reads it, and a field for each of an event's.
//!
//! systemd.io/JOURNAL_NATIVE_PROTOCOL. Of the libraries, none puts into the line what is in the fields,
//! and a line is what `journalctl` shows.

use std::fmt::{Debug, Write as _};
use std::io;
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};

use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::Context;

/// Sends events to the journal.
#[derive(Debug)]
pub struct Journal {
    socket: UnixDatagram,
    path: PathBuf,
    /// Entries that it had no room for.
    lost: AtomicU64,
}

impl Journal {
    /// The journal of this host.
    ///
    /// # Errors
    ///
    /// Returns why there is none.
    pub fn open() -> io::Result<Self> {
        Self::at(PathBuf::from("/run/systemd/journal/socket"))
    }

    fn at(path: PathBuf) -> io::Result<Self> {
        let socket = UnixDatagram::unbound()?;
        // A journal that takes nothing any more must not hold up what is logged.
        socket.set_nonblocking(true)?;
        // Nothing is a message as well, which says nothing.
        socket.send_to(&[], &path)?;
        let lost = AtomicU64::new(0);
        Ok(Self { socket, path, lost })
    }

    fn send(&self, entry: &JournalEntry, priority: &str, target: &str) -> io::Result<()> {
        let sent = self
            .socket
            .send_to(&entry.message(priority, target), &self.path);
        match sent {
            // More than `net.core.wmem_max`: the line alone, as much of it as a reader bears.
            Err(error) if error.raw_os_error() == Some(libc::EMSGSIZE) => {
                let cut = entry.cut().message(priority, target);
                self.socket.send_to(&cut, &self.path).map(drop)
            }
            sent => sent.map(drop),
        }
    }
}

impl<S: Subscriber> Layer<S> for Journal {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let mut entry = JournalEntry::default();
        event.record(&mut entry);
        let lost = self.lost.swap(0, Ordering::Relaxed);
        if lost > 0 {
            // Writing to a string does not fail.
            match write!(entry.line, " ({lost} lines before it were lost)") {
                Ok(_) | Err(_) => {}
            }
        }
        let metadata = event.metadata();
        let sent = self.send(&entry, priority(*metadata.level()), metadata.target());
        if sent.is_err() {
            self.lost.fetch_add(lost + 1, Ordering::Relaxed);
        }
    }
}

/// What becomes of an event.
#[derive(Default)]
struct JournalEntry {
    line: String,
    fields: Vec<u8>,
}

impl JournalEntry {
    /// The entry as the journal takes it.
    fn message(&self, priority: &str, target: &str) -> Vec<u8> {
        let mut message = self.fields.clone();
        append(&mut message, "MESSAGE", &self.line);
        append(&mut message, "PRIORITY", priority);
        append(&mut message, "SYSLOG_IDENTIFIER", "pullgate");
        append(&mut message, "TARGET", target);
        message
    }

    /// The beginning of the line, without the fields.
    fn cut(&self) -> Self {
        let end = self.line.floor_char_boundary(LINE_MAX);
        let rest = self.line.len() - end;
        Self {
            line: format!("{} … ({rest} bytes more)", &self.line[..end]),
            fields: Vec::new(),
        }
    }

    fn add(&mut self, field: &Field, value: &str, shown: &dyn Debug) {
        if field.name() == "message" {
            self.line.insert_str(0, value);
            return;
        }
        // Where in a library's source it comes from.
        if field.name().starts_with("log.") {
            return;
        }
        // Writing to a string does not fail.
        match write!(self.line, " {}={shown:?}", field.name()) {
            Ok(_) | Err(_) => {}
        }
        let name = format!("F_{}", field.name().to_uppercase().replace('.', "_"));
        append(&mut self.fields, &name, value);
    }
}

impl Visit for JournalEntry {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.add(field, value, &value);
    }

    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.add(field, &format!("{value:?}"), value);
    }
}

/// Adds a field whose value may hold anything.
fn append(message: &mut Vec<u8>, name: &str, value: &str) {
    message.extend(name.as_bytes());
    message.push(b'\n');
    message.extend((value.len() as u64).to_le_bytes());
    message.extend(value.as_bytes());
    message.push(b'\n');
}

/// syslog(3).
fn priority(level: Level) -> &'static str {
    match level {
        Level::ERROR => "3",
        Level::WARN => "4",
        Level::INFO => "6",
        Level::DEBUG | Level::TRACE => "7",
    }
}

/// Bytes of a line that stands for an entry without room.
const LINE_MAX: usize = 16 << 10;

#[cfg(test)]
mod tests {
    use tracing_subscriber::layer::SubscriberExt as _;

    use super::*;

    #[test]
    fn a_line_says_what_the_fields_do() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let journald = UnixDatagram::bind(&path).unwrap();
        let journal = Journal::at(path).unwrap();
        let mut message = [0; 1024];
        assert_eq!(journald.recv(&mut message).unwrap(), 0);

        let subscriber = tracing_subscriber::registry().with(journal);
        tracing::subscriber::with_default(subscriber, || {
            tracing::warn!(client = %"192.0.2.1", name = "a\nPRIORITY=0", "refused");
        });

        let length = journald.recv(&mut message).unwrap();
        let mut fields = Vec::new();
        let mut rest = &message[..length];
        while let Some(end) = rest.iter().position(|byte| *byte == b'\n') {
            let (name, value) = (&rest[..end], &rest[end + 1..]);
            let (size, value) = value.split_at(8);
            let size = usize::try_from(u64::from_le_bytes(size.try_into().unwrap())).unwrap();
            fields.push((
                name.to_vec(),
                String::from_utf8(value[..size].to_vec()).unwrap(),
            ));
            rest = &value[size + 1..];
        }
        let value = |name: &str| {
            let mut found = fields.iter().filter(|(found, _)| found == name.as_bytes());
            let value = found.next().unwrap().1.as_str();
            assert!(found.next().is_none(), "{name}");
            value
        };
        assert_eq!(
            value("MESSAGE"),
            "refused client=192.0.2.1 name=\"a\\nPRIORITY=0\""
        );
        assert_eq!(value("PRIORITY"), "4");
        assert_eq!(value("F_CLIENT"), "192.0.2.1");
        assert_eq!(value("F_NAME"), "a\nPRIORITY=0");
    }

    #[test]
    fn what_is_too_large_for_a_datagram_is_cut() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let journald = UnixDatagram::bind(&path).unwrap();
        let subscriber = tracing_subscriber::registry().with(Journal::at(path).unwrap());
        assert_eq!(journald.recv(&mut [0; 16]).unwrap(), 0);
        let long = "ä".repeat(4 << 20);

        tracing::subscriber::with_default(subscriber, || tracing::warn!(long, "large"));

        let mut entry = vec![0; 1 << 20];
        let length = journald.recv(&mut entry).unwrap();
        let entry = String::from_utf8_lossy(&entry[..length]);
        assert!(length < 2 * LINE_MAX, "{length}");
        assert!(entry.contains("large long=\"ää"), "{entry}");
        assert!(entry.contains(" bytes more)"));
        assert!(entry.contains("PRIORITY\n"));
    }

    #[test]
    fn what_a_full_journal_loses_is_counted() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let journald = UnixDatagram::bind(&path).unwrap();
        let subscriber = tracing_subscriber::registry().with(Journal::at(path).unwrap());
        let receive = || {
            let mut message = [0; 1024];
            let length = journald.recv(&mut message).unwrap();
            String::from_utf8_lossy(&message[..length]).into_owned()
        };

        tracing::subscriber::with_default(subscriber, || {
            for _ in 0..10_000 {
                tracing::info!("too much");
            }
            receive();
            let lines = loop {
                let lines = receive();
                if !lines.contains("too much") {
                    break lines;
                }
                tracing::info!("room again");
            };
            assert!(lines.contains("room again ("), "{lines}");
            assert!(lines.contains(" lines before it were lost)"), "{lines}");
        });
    }
}
