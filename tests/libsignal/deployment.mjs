// Where a test's server keeps what it has: a folder, or the database, bus and bucket that `scripts/services` started.

import { execFile } from 'node:child_process';
import { randomBytes } from 'node:crypto';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { promisify } from 'node:util';

const LIMIT_MS = 30_000;

/** What OBSCURA_TEST_DEPLOYMENT asks for. `variables` are the server's, `remove` forgets what it has stored. */
export function deploy() {
  const wanted = process.env.OBSCURA_TEST_DEPLOYMENT || 'embedded';
  if (wanted === 'embedded') return folder();
  if (wanted === 'distributed') return services();
  throw new Error(`OBSCURA_TEST_DEPLOYMENT: "${wanted}" is not allowed; it takes embedded or distributed`);
}

async function folder() {
  const path = await mkdtemp(join(tmpdir(), 'obscura-libsignal-'));
  return { variables: { OBSCURA_DATA_DIR: path }, remove: () => rm(path, { recursive: true, force: true }) };
}

/** A database, a bucket and prefixes that no other server has. */
async function services() {
  const name = `libsignal-${randomBytes(8).toString('hex')}`;
  const database = new URL(service('POSTGRES_URL'));
  database.pathname = name;
  await sql(`CREATE DATABASE "${name}"`);
  const variables = {
    OBSCURA_DATABASE_URL: database.href,
    OBSCURA_PUBSUB_URL: service('VALKEY_URL'),
    OBSCURA_NOTIFICATIONS_CHANNEL_PREFIX: `${name}:user:`,
    OBSCURA_NOTIFICATIONS_PUSH_QUEUE_KEY: `${name}:jobs`,
    OBSCURA_STORAGE_ENDPOINT: service('S3_ENDPOINT'),
    OBSCURA_STORAGE_ACCESS_KEY: service('S3_ACCESS_KEY'),
    OBSCURA_STORAGE_SECRET_KEY: service('S3_SECRET_KEY'),
    OBSCURA_STORAGE_FORCE_PATH_STYLE: 'true',
    OBSCURA_STORAGE_BUCKET: name,
    OBSCURA_STORAGE_CREATE_BUCKET: 'true',
    OBSCURA_AUTH_JWT_SECRET: randomBytes(32).toString('hex'),
  };
  // The bucket ends with the services.
  return { variables, remove: () => sql(`DROP DATABASE "${name}" WITH (FORCE)`) };
}

function service(name) {
  const value = process.env[`OBSCURA_TEST_${name}`];
  if (!value) throw new Error(`OBSCURA_TEST_${name} is not set: run the tests by \`scripts/services node --test …\``);
  return value;
}

/** Runs a statement by PostgreSQL's own client, which comes with the server: one library less to install. */
async function sql(statement) {
  const psql = join(service('POSTGRES_BIN'), 'psql');
  const options = ['--no-psqlrc', '--quiet', '--set=ON_ERROR_STOP=1', '--dbname', service('POSTGRES_URL')];
  await promisify(execFile)(psql, [...options, '--command', statement], { timeout: LIMIT_MS });
}
