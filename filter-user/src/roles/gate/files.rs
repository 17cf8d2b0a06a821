//! The gate's files and upstreams, followed: read again when they change, asked again until they answer.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::spawn_blocking;
use tracing::{error, info};

use super::{GateRole, settings};
use crate::config::{Config, GateSettings};
use crate::gate::Upstreams;
use crate::host::file::{self, FileId, FileWatch};
use crate::report::chain;
use crate::sync::lock;

impl GateRole {
    /// Asks upstreams again that have not answered what they speak, and logs what time changes.
    pub(super) async fn follow_upstreams(self) {
        loop {
            tokio::time::sleep(LOOK_AGAIN).await;
            self.gate.ask_upstreams(Upstreams::Unanswered).await;
            self.warn_of_news_aside().await;
        }
    }

    /// Reads certificates, keys, CAs and lists again when they change.
    pub(super) async fn follow_files(self, mut config: watch::Receiver<Arc<Config>>) {
        loop {
            let now = Arc::clone(&config.borrow_and_update());
            let Some(settings) = settings(&now) else {
                return;
            };
            let watching = settings.clone();
            let watching = spawn_blocking(move || watch_files(&watching)).await;
            let mut watch = watching.unwrap_or_default();
            loop {
                tokio::select! {
                    changed = config.changed() => match changed {
                        Ok(()) => break,
                        Err(_) => return,
                    },
                    () = settled(&mut watch) => {}
                    // What no watch reports: a directory that is replaced, a link to a link.
                    () = tokio::time::sleep(LOOK_AGAIN) => {}
                }
                let role = self.clone();
                let config = config.clone();
                let reading = spawn_blocking(move || role.read_if_changed(&config));
                if matches!(reading.await, Ok(true)) {
                    self.wait_until_ready().await;
                }
            }
        }
    }

    /// Whether files have changed, and some of them are used by now.
    fn read_if_changed(&self, config: &watch::Receiver<Arc<Config>>) -> bool {
        let _turn = lock(&self.turn);
        // The one of now: a reload may have had its turn before.
        let config = Arc::clone(&config.borrow());
        let Some(settings) = settings(&config) else {
            return false;
        };
        if file_ids(settings) == *lock(&self.read) {
            return false;
        }
        let ids = file_ids(settings);
        let files = match self.load(settings) {
            Ok(files) => files,
            Err(error) => {
                // Not again until something changes.
                *lock(&self.read) = ids;
                self.note_refusal();
                let error = chain(&error);
                let text = format!("what is on disk is not what is active: {error}");
                self.unusable.send_replace(Some(text));
                error!(
                    id = "files-not-reloaded",
                    error, "files not used, what was read before stays"
                );
                return false;
            }
        };
        match self.apply(settings, files) {
            Some(error) => error!(
                id = "files-partly-reloaded",
                error, "files of some hosts not used, the others' are read again"
            ),
            None => info!(
                id = "files-reloaded",
                "certificates, keys, CAs and revocation lists are read again"
            ),
        }
        true
    }
}

/// What the files of the gate are like.
pub(super) fn file_ids(settings: &GateSettings) -> Vec<Option<FileId>> {
    let files = settings.files();
    files.iter().map(|path| file::file_id(path)).collect()
}

fn watch_files(settings: &GateSettings) -> Option<FileWatch> {
    let unwatched = |error: &_| {
        // A directory for keys may be entered and not listed, as Debian's is.
        info!(
            id = "files-not-watched",
            %error,
            "not all directories of the gate's files can be watched: changes there are found within {} s",
            LOOK_AGAIN.as_secs()
        );
    };
    FileWatch::new(&settings.files())
        .inspect_err(unwatched)
        .ok()
}

/// Returns when files have changed, and no other has for [`SETTLE`]: a certificate and its key are
/// two.
async fn settled(watch: &mut Option<FileWatch>) {
    let Some(watch) = watch else {
        return std::future::pending().await;
    };
    watch.changed().await;
    for _ in 0..SETTLE_MAX {
        if tokio::time::timeout(SETTLE, watch.changed()).await.is_err() {
            return;
        }
    }
}

/// How long no file may change before all are read.
const SETTLE: Duration = Duration::from_millis(300);
/// However often files change, they are read after as many changes.
const SETTLE_MAX: u32 = 20;
/// How long until files are looked at that no watch reports, and upstreams are asked that did not answer.
const LOOK_AGAIN: Duration = Duration::from_secs(5);
