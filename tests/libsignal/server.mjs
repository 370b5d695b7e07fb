// Starts the real server binary for a test, on free ports and with a store of its own.

import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { access, constants } from 'node:fs/promises';
import { fileURLToPath } from 'node:url';

import { deploy } from './deployment.mjs';
import { within } from './within.mjs';

const DEFAULT_BINARY = fileURLToPath(new URL('../../target/debug/obscura-server', import.meta.url));
const BINARY = process.env.OBSCURA_SERVER_BIN || DEFAULT_BINARY;
const API = /^\s*API\s+(http:\/\/\S+)/m;
const MANAGEMENT = /^\s*management\s+(http:\/\/\S+)/m;
// The tests are about messages, and all of them come from one address.
const NO_RATE_LIMITS = [
  ['--rate-limit-per-second', '10000'], ['--rate-limit-burst', '10000'],
  ['--auth-rate-limit-per-second', '10000'], ['--auth-rate-limit-burst', '10000'],
  ['--account-rate-limit-per-second', '0'], ['--target-rate-limit-per-second', '0'], ['--prekey-fetches-per-hour', '0'],
  ['--one-time-prekeys-per-hour', '0'], ['--sign-ups-per-hour', '0'], ['--sign-ups-per-day-per-address', '0'],
  ['--sign-ups-per-day-per-network', '0'], ['--wrong-passwords-per-hour', '0'], ['--upload-rate-limit-per-second', '0'],
].flat();

/** A running server. `api` and `management` are its two addresses; both change when it is started again. */
export class Server {
  api;
  management;
  #deployment;
  #options;
  #process;
  #output = '';
  #isRunning = false;

  static async start({ hasRateLimits = false } = {}) {
    await access(BINARY, constants.X_OK).catch(() => {
      throw new Error(`there is no server at ${BINARY}: build it first, or name it in OBSCURA_SERVER_BIN`);
    });
    const server = new Server();
    server.#deployment = await deploy();
    server.#options = hasRateLimits ? [] : NO_RATE_LIMITS;
    await server.#start().catch(async (error) => {
      await server.remove();
      throw error;
    });
    return server;
  }

  /** Ends the server without any warning, as far as it can tell from a power cut. */
  kill() {
    return this.#end('SIGKILL');
  }

  /** Starts the server again on what it has stored, at a new address. */
  startAgain() {
    return this.#start();
  }

  /** Ends the server for good and removes what it stored. */
  async remove() {
    await this.#end('SIGKILL');
    await this.#deployment.remove();
  }

  get isRunning() {
    return this.#isRunning;
  }

  async #start() {
    const where = ['--server-host', '127.0.0.1', '--server-port', '0', '--mgmt-port', '0'];
    // Settings of the person who runs the tests must not change what they prove.
    const environment = Object.fromEntries(Object.entries(process.env).filter(([name]) => !name.startsWith('OBSCURA_')));
    const options = { env: { ...environment, ...this.#deployment.variables }, stdio: ['ignore', 'pipe', 'pipe'] };
    this.#output = '';
    this.#process = spawn(BINARY, [...where, ...this.#options], options);
    for (const stream of [this.#process.stdout, this.#process.stderr]) stream.setEncoding('utf8');
    this.#process.stderr.on('data', (text) => (this.#output = (this.#output + text).slice(-4000)));

    let banner = '';
    const ready = new Promise((resolve, reject) => {
      this.#process.once('error', reject);
      this.#process.once('exit', (code) => reject(new Error(`the server ended with code ${code}:\n${this.#output}`)));
      this.#process.stdout.on('data', (text) => {
        if (API.test(banner) && MANAGEMENT.test(banner)) return;
        banner += text;
        if (API.test(banner) && MANAGEMENT.test(banner)) resolve();
      });
    });
    await within(30, ready, 'the server to say where it listens');
    this.api = API.exec(banner)[1];
    this.management = MANAGEMENT.exec(banner)[1];
    this.#isRunning = true;
  }

  async #end(signal) {
    this.#isRunning = false;
    if (this.#process.exitCode !== null || this.#process.signalCode !== null) return;
    const ended = once(this.#process, 'exit');
    this.#process.kill(signal);
    await within(10, ended, 'the server to end');
  }
}
