// Numbers as people read them; the server's `numbers.py` writes them in the same way.
const MINUS = "\u2212";

export function number(value, digits = 3) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-4 || size >= 1e6)) {
    const [mantissa, exponent] = value.toExponential(digits - 1).split("e");
    const raised = String(Number(exponent)).replace(/./g, (char) => "⁰¹²³⁴⁵⁶⁷⁸⁹⁻"["0123456789-".indexOf(char)]);
    return `${mantissa} × 10${raised}`.replace("-", MINUS);
  }
  const text = size === 0 ? "0" : value.toFixed(Math.max(0, digits - 1 - Math.floor(Math.log10(size))));
  return text.replace("-", MINUS);
}

export const percent = (value, decimals = 1) => `${(100 * value).toFixed(decimals).replace("-", MINUS)}\u202f%`;
export const count = (value) => String(value).replace(/\B(?=(\d{3})+(?!\d))/g, "\u202f");
export const metric = (value, name) => (value !== null && name.includes("accuracy") ? percent(value, 2) : number(value));

export function size(bytes) {
  const power = Math.min(5, Math.floor(Math.log10(Math.max(bytes, 1)) / 3));
  return `${(bytes / 1000 ** power).toFixed(power ? 1 : 0)}\u202f${["B", "kB", "MB", "GB", "TB", "PB"][power]}`;
}

export function duration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds < 60) return `${seconds.toFixed(seconds < 10 ? 1 : 0)}\u202fs`;
  return `${Math.floor(seconds / 60)}\u202fmin ${Math.round(seconds % 60)}\u202fs`;
}
