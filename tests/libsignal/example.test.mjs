import assert from 'node:assert/strict';
import { execFile } from 'node:child_process';
import { after, before, test } from 'node:test';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';

import { Town } from './people.mjs';

const STORY = fileURLToPath(new URL('../../examples/javascript/two-people.mjs', import.meta.url));

let town;
before(async () => (town = await Town.open({ hasRateLimits: true })));
after(() => town?.close());

function runStory() {
  return promisify(execFile)(process.execPath, [STORY, town.server.api], { timeout: 30_000 });
}

test('the example runs to its end, several times in a row, within the default rate limits', async () => {
  for (let run = 1; run <= 3; run++) {
    const { stdout } = await runStory();
    assert.match(stdout, /The end\.\s*$/);
  }
});

test('the example without a server says so in a sentence', async () => {
  await town.server.kill();

  const failure = await runStory().catch((error) => error);

  assert.equal(failure.code, 1);
  assert.match(failure.stderr, /Is the server running there\?/);
  assert.doesNotMatch(failure.stderr, /^\s+at /m);
});
