// Sound that plays while it is still being spoken: 24 kHz mono s16le, scheduled piece after piece.
const RATE = 24_000;

export class Player {
  #context = new AudioContext({ sampleRate: RATE }); // made in a click, or browsers keep it silent
  #until = 0;
  #odd = new Uint8Array(0);

  push(bytes) {
    const whole = joined([this.#odd, bytes]);
    const even = whole.length - (whole.length % 2);
    this.#odd = whole.slice(even);
    if (!even) return;
    const samples = Float32Array.from(new Int16Array(whole.buffer, 0, even / 2), (sample) => sample / 32768);
    const buffer = this.#context.createBuffer(1, samples.length, RATE);
    buffer.copyToChannel(samples, 0);
    const source = this.#context.createBufferSource();
    source.buffer = buffer;
    source.connect(this.#context.destination);
    this.#until = Math.max(this.#until, this.#context.currentTime);
    source.start(this.#until);
    this.#until += buffer.duration;
  }

  stop() {
    if (this.#context.state !== "closed") this.#context.close();
  }
}

export function joined(parts) {
  const whole = new Uint8Array(parts.reduce((sum, part) => sum + part.length, 0));
  let at = 0;
  for (const part of parts) {
    whole.set(part, at);
    at += part.length;
  }
  return whole;
}

// The samples of a WAV that came in pieces: what follows its header, once that is all there.
export class Unwrapped {
  #head = new Uint8Array(0);
  #found = false;

  push(bytes) {
    if (this.#found) return bytes;
    this.#head = joined([this.#head, bytes]);
    const at = new TextDecoder("latin1").decode(this.#head).indexOf("data", 12);
    if (at < 0 || this.#head.length < at + 8) return new Uint8Array(0);
    this.#found = true;
    return this.#head.slice(at + 8);
  }
}

// A file of samples, with the length that a header sent ahead of them could not know.
export function wav(samples) {
  const header = new DataView(new ArrayBuffer(44));
  const text = (at, word) => [...word].forEach((letter, place) => header.setUint8(at + place, letter.charCodeAt(0)));
  text(0, "RIFF");
  header.setUint32(4, 36 + samples.length, true);
  text(8, "WAVEfmt ");
  header.setUint32(16, 16, true);
  header.setUint16(20, 1, true); // PCM
  header.setUint16(22, 1, true);
  header.setUint32(24, RATE, true);
  header.setUint32(28, 2 * RATE, true);
  header.setUint16(32, 2, true);
  header.setUint16(34, 16, true);
  text(36, "data");
  header.setUint32(40, samples.length, true);
  return new Blob([header, samples], { type: "audio/wav" });
}

export const seconds = (samples) => samples.length / 2 / RATE;
