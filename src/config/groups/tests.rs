use super::*;
use crate::config::Config;

#[test]
fn a_sqlite_url_names_a_file_in_the_usual_spellings() {
    let mut database = Config::embedded(Path::new("/var/data")).unwrap().database;
    assert_eq!(database.file(), Some(Path::new("/var/data/obscura.db")));
    for (url, file) in [
        ("sqlite:a.db", Some("a.db")),
        ("sqlite://a.db?mode=rwc", Some("a.db")),
        ("sqlite:///a.db", Some("/a.db")),
        ("postgres://db/a", None),
    ] {
        database.url = Secret::new(url);
        assert_eq!(database.file(), file.map(Path::new), "{url}");
    }
}
