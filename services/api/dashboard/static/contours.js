// Contour lines of values on a grid, by marching squares: for each level the line pieces that cross each cell.

// Pieces as [x1, y1, x2, y2] in grid coordinates; a cell with a missing corner has none.
export function contour(rows, level) {
  const pieces = [];
  for (let j = 0; j + 1 < rows.length; j += 1) {
    for (let i = 0; i + 1 < rows[j].length; i += 1) {
      const corners = [rows[j][i], rows[j][i + 1], rows[j + 1][i + 1], rows[j + 1][i]];
      if (corners.some((value) => value === null)) continue;
      pieces.push(...cell(corners, level).map(([x1, y1, x2, y2]) => [i + x1, j + y1, i + x2, j + y2]));
    }
  }
  return pieces;
}

function cell([a, b, c, d], level) {
  const part = (from, to) => (level - from) / (to - from);
  const edges = [];
  if (a < level !== b < level) edges.push([part(a, b), 0]);
  if (b < level !== c < level) edges.push([1, part(b, c)]);
  if (d < level !== c < level) edges.push([part(d, c), 1]);
  if (a < level !== d < level) edges.push([0, part(a, d)]);
  if (edges.length === 2) return [[...edges[0], ...edges[1]]];
  if (edges.length < 4) return [];
  // a saddle: which corners are joined, the value in the middle decides
  const isHighInside = (a + b + c + d) / 4 >= level;
  const [top, right, bottom, left] = edges;
  const isTogether = isHighInside === a >= level;
  return isTogether ? [[...top, ...right], [...bottom, ...left]] : [[...top, ...left], [...right, ...bottom]];
}

// Levels that are close together near the minimum, as in the paper's figures: equal steps of the logarithm above it.
export function levels(rows, num) {
  const all = rows.flat().filter((value) => value !== null);
  const [low, high] = [Math.min(...all), Math.max(...all)];
  if (!(high > low)) return [];
  const floor = (high - low) / 200;
  return Array.from({ length: num }, (_, index) => low + floor * ((high - low) / floor) ** ((index + 1) / (num + 1)));
}

// The same surface on a grid `times` as fine, by cubics through the measured points (Catmull and Rom 1974); as it is
// where a point is missing.
export function smooth(rows, times) {
  if (rows.flat().some((value) => value === null)) return rows;
  return transposed(transposed(rows.map((row) => finer(row, times))).map((column) => finer(column, times)));
}

const transposed = (rows) => rows[0].map((_, index) => rows.map((row) => row[index]));

function finer(values, times) {
  const at = (index) => values[Math.min(Math.max(index, 0), values.length - 1)];
  return Array.from({ length: (values.length - 1) * times + 1 }, (_, index) => {
    const start = Math.floor(index / times);
    const t = index / times - start;
    const [a, b, c, d] = [at(start - 1), at(start), at(start + 1), at(start + 2)];
    return b + 0.5 * t * (c - a + t * (2 * a - 5 * b + 4 * c - d + t * (3 * (b - c) + d - a)));
  });
}
