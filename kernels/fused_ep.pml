/* The protocol of docs/fused.md as a model that SPIN checks: `make model-check`. docs/fused.md, Model, says what it leaves out.

   A word of memory holds the epoch that wrote it last. A task is three steps, and anything may happen between two of them:
   take its number, wait and begin to read; end reading and store; raise flags. What is read must be of this epoch at the beginning
   and at the end: rows that are not there yet, and rows overwritten while they are read, are both a failed assertion.

   W ranks, P programs of each, N launches, X experts of a rank, BM rows of a tile, FT and NT columns, WAVE tiles of a wave, MT
   matrix tiles of an expert's gradients, CT token tiles of a rank, MOST rows of a source and expert. With APART launches are in
   turn those of kernels/fused_rows.py: rows out, up tasks waiting for them and no more, and results back. With TRACE, and trace.pml, which
   tests/kernels/spin.py writes of a kernel's events, every event must be the next one of the trace. */

#ifndef W
#define W 2
#endif
#ifndef P
#define P 2
#endif
#ifndef N
#define N 2
#endif
#ifndef X
#define X 1
#endif
#ifndef BM
#define BM 2
#endif
#ifndef MOST
#define MOST 1
#endif
#ifndef TILES
#define TILES (X * ((W * MOST + BM - 1) / BM))
#endif
#ifndef FT
#define FT 1
#endif
#ifndef NT
#define NT 1
#endif
#ifndef WAVE
#define WAVE 1
#endif
#ifndef MT
#define MT 1
#endif
#ifndef CT
#define CT 1
#endif
#define E (W * X)
#ifdef APART
#define GIVES(n) ((n) % 2 == 0)         /* results back, of the rows that the launch before took out */
#define COMBINES(n) GIVES(n)
#define COUNTED(n) (!backward[n] && !GIVES(n))
#else
#define GIVES(n) false
#define COMBINES(n) true
#define COUNTED(n) (!backward[n])
#endif

/* Kinds of tasks and events, numbered as in the trace. */
#define PLAN 0
#define DISPATCH 1
#define UP 2
#define DOWN 3
#define WEIGHT 4
#define COMBINE 5
#define NONE 6
#define NIL -1

/* What the launches are of: chosen in init, then constant. */
bool backward[N + 1];
bool shared[N + 1];                     /* a token needed by several experts of a rank crosses once */
byte tiles[(N + 1) * W];                /* of an owner */
byte expert[(N + 1) * W * TILES];       /* of a tile, among its owner's */
byte sources[(N + 1) * W * TILES];      /* bit s: source s has rows in the tile */
#define HAS(n, w, t, s) ((sources[((n) * W + (w)) * TILES + (t)] >> (s)) & 1)
#define EXPERT(n, w, t) expert[((n) * W + (w)) * TILES + (t)]

/* Memory of rank w. Tags of what is stored, and flags. */
byte counts[W * 2 * W], met[W * 2 * W];
byte rows[W * TILES * W], arrived[W * TILES * W];       /* rows: with origin, alias and weight, which one flag guards */
byte planned[W], ready[W * TILES * FT], h[W * TILES * FT];
byte slots[W * W * TILES * NT], back[W * W * TILES * NT];
byte tables[W];                         /* which rows stand where: written by the plan */
byte queue[W], done[W], epoch[W];
#define PARITY(w, n, s) [((w) * 2 + (n) % 2) * W + (s)]
#define TILE(w, t, s) [((w) * TILES + (t)) * W + (s)]
#define LOCAL(w, t, f) [((w) * TILES + (t)) * FT + (f)]
#define RETURN(s, w, t, n) [(((s) * W + (w)) * TILES + (t)) * NT + (n)]

#ifdef TRACE
chan log = [0] of { byte, byte, byte, byte, short, short, short, short };
#define EVENT(what, tile, index, peer, value) log ! w, p, n, what, tile, index, peer, value
#include "trace.pml"
#else
#define UPS(n) FT
#define EVENT(what, tile, index, peer, value) skip
#define ALIAS(n, w, t, s, u) (shared[n] && EXPERT(n, w, u) < EXPERT(n, w, t) && HAS(n, w, u, s))
#define NEEDS(n, s, c, w, t) HAS(n, w, t, s)
#endif

/* Scratch that no state keeps: used inside one step only. */
hidden byte a, b, first, last;
hidden short k;

/* Which task a number is; the order of docs/fused.md. */
inline decode() {
  d_step {
    k = number; kind = NONE; tile = 0; column = 0; peer = 0;
    if
    :: k == 0 -> kind = PLAN
    :: else -> k--
    fi;
    for (a : 0 .. W - 1) {
      for (b : 0 .. TILES - 1) {
        if
        :: kind == NONE && !GIVES(n) && b < tiles[n * W + (w + a) % W] && HAS(n, (w + a) % W, b, w) ->
          if
          :: k == 0 -> kind = DISPATCH; peer = (w + a) % W; tile = b
          :: else -> k--
          fi
        :: else
        fi
      }
    }
#ifdef APART
    first = (GIVES(n) -> NT : 1);
    if
    :: kind == NONE && k < tiles[n * W + w] * first -> kind = (GIVES(n) -> DOWN : UP); tile = k / first; column = k % first
    :: kind == NONE && k >= tiles[n * W + w] * first -> k = k - tiles[n * W + w] * first
    :: else
    fi;
#else
    first = 0;
    do
    :: kind == NONE && first < tiles[n * W + w] ->
      last = (first + WAVE < tiles[n * W + w] -> first + WAVE : tiles[n * W + w]);
      if
      :: k < (last - first) * UPS(n) -> kind = UP; tile = first + k % (last - first); column = k / (last - first)
      :: else ->
        k = k - (last - first) * UPS(n);
        if
        :: k < (last - first) * NT -> kind = DOWN; tile = first + k % (last - first); column = k / (last - first)
        :: else -> k = k - (last - first) * NT
        fi
      fi;
      first = last
    :: else -> break
    od;
    if
    :: kind == NONE && backward[n] ->
      if
      :: k < X * MT -> kind = WEIGHT; tile = k / MT; column = k % MT
      :: else -> k = k - X * MT
      fi
    :: else
    fi;
#endif
    if
    :: kind == NONE && COMBINES(n) && k < CT * NT -> kind = COMBINE; tile = k / NT; column = k % NT
    :: else
    fi
  }
}

/* All that a task reads is of this epoch. */
inline check_reads() {
  d_step {
    assert(kind == PLAN || tables[w] == n);
    if
    :: kind == PLAN && COUNTED(n) ->
      for (a : 0 .. W - 1) { assert(counts PARITY(w, n, a) == n) }
    :: kind == UP || kind == DOWN || kind == WEIGHT ->
      for (b : 0 .. TILES - 1) {
        if
        :: b < tiles[n * W + w] && (kind == WEIGHT -> EXPERT(n, w, b) == tile : b == tile) ->
          for (a : 0 .. W - 1) {
            if
            :: HAS(n, w, b, a) ->
              assert(rows TILE(w, b, a) == n - GIVES(n));
              for (first : 0 .. TILES - 1) {
                if
                :: kind != DOWN && first < b && ALIAS(n, w, b, a, first) -> assert(rows TILE(w, first, a) == n)
                :: else
                fi
              }
            :: else
            fi
          }
#ifndef APART
          for (a : 0 .. UPS(n) - 1) { assert(kind == UP || h LOCAL(w, b, a) == n) }
#endif
        :: else
        fi
      }
    :: kind == COMBINE ->
      for (a : 0 .. W - 1) {
        for (b : 0 .. TILES - 1) {
          if
          :: b < tiles[n * W + a] && NEEDS(n, w, tile, a, b) -> assert(slots RETURN(w, a, b, column) == n)
          :: else
          fi
        }
      }
    :: else
    fi
  }
}

inline wait_arrived(t, s) {
  arrived TILE(w, t, s) == n;
  EVENT(7, t, NIL, s, n)
}

inline wait_ready(t) {
  j = 0;
  do
  :: j < UPS(n) -> ready LOCAL(w, t, j) == n; EVENT(9, t, j, NIL, n); j++
  :: else -> break
  od;
  j = 0
}

proctype program(byte w, p) {
  byte n = 1, number, kind, tile, column, peer, i, j;
  bool known;
launch:
  atomic {
    epoch[w] == n - 1;                  /* the launch before has ended on this rank: one stream */
  take:
    number = queue[w]; queue[w] = queue[w] + 1;
    decode();
    if
    :: number > 0 && !known -> planned[w] == n; known = true; EVENT(5, NIL, NIL, NIL, n)
    :: else
    fi;
    EVENT(0, NIL, number, NIL, kind);
    if
    :: kind == PLAN ->
      i = 0;
      do                                /* stores of counts, before any flag */
      :: i < W && COUNTED(n) -> counts PARITY(i, n, w) = n; i++
      :: else -> break
      od;
      i = 0
    :: kind == NONE -> goto finish
    :: else
    fi
  }
  atomic {
    if
    :: kind == PLAN ->
      do
      :: i < W -> EVENT(2, NIL, n % 2, i, n); met PARITY(i, n, w) = n; i++
      :: else -> break
      od;
      i = 0;
      do
      :: i < W -> met PARITY(w, n, i) == n; EVENT(3, NIL, n % 2, i, n); i++
      :: else -> break
      od
    :: kind == UP ->
      do
      :: i < W ->
        if
        :: HAS(n, w, tile, i) -> wait_arrived(tile, i)
        :: else
        fi;
        i++
      :: else -> break
      od;
      i = 0;
      do
      :: i < W && tile > 0 ->
        if
        :: HAS(n, w, tile, i) && j < tile && ALIAS(n, w, tile, i, j) -> wait_arrived(j, i)
        :: else
        fi;
        j++;
        if
        :: j >= tile -> j = 0; i++
        :: else
        fi
      :: else -> break
      od
#ifndef APART
    :: kind == DOWN -> wait_ready(tile)
#endif
    :: kind == WEIGHT ->
      do
      :: i < tiles[n * W + w] ->
        if
        :: EXPERT(n, w, i) == tile -> wait_ready(i)
        :: else
        fi;
        i++
      :: else -> break
      od
    :: kind == COMBINE ->
      do
      :: i < W ->
        if
        :: j < tiles[n * W + i] && NEEDS(n, w, tile, i, j) ->
          back RETURN(w, i, j, column) == n;
          EVENT(11, j, column, i, n)
        :: else
        fi;
        j++;
        if
        :: j >= TILES -> j = 0; i++
        :: else
        fi
      :: else -> break
      od
    :: else
    fi;
    i = 0; j = 0;
    EVENT(1, (kind == PLAN -> NIL : tile), (kind == PLAN || kind == DISPATCH -> NIL : column), (kind == DISPATCH -> peer : NIL), kind);
    check_reads()
  }
  d_step {
    check_reads();
    /* Nothing is done twice. */
    assert((kind != DISPATCH || rows TILE(peer, tile, w) != n) && (kind != UP || h LOCAL(w, tile, column) != n));
    if
    :: kind == PLAN -> tables[w] = n
    :: kind == DISPATCH -> rows TILE(peer, tile, w) = n
#ifndef APART
    :: kind == UP -> h LOCAL(w, tile, column) = n
#endif
    :: kind == DOWN ->
      for (a : 0 .. W - 1) {
        if
        :: HAS(n, w, tile, a) -> slots RETURN(a, w, tile, column) = n
        :: else
        fi
      }
    :: else
    fi
  }
  atomic {
    if
    :: kind == PLAN -> EVENT(4, NIL, NIL, NIL, n); planned[w] = n
    :: kind == DISPATCH -> EVENT(6, tile, NIL, peer, n); arrived TILE(peer, tile, w) = n
#ifndef APART
    :: kind == UP -> EVENT(8, tile, column, NIL, n); ready LOCAL(w, tile, column) = n
#endif
    :: kind == DOWN ->
      do
      :: i < W ->
        if
        :: HAS(n, w, tile, i) -> EVENT(10, tile, column, i, n); back RETURN(i, w, tile, column) = n
        :: else
        fi;
        i++
      :: else -> break
      od;
      i = 0
    :: else
    fi;
    goto take
  }
finish:
  atomic {
    i = done[w];
    done[w] = done[w] + 1;
    EVENT(13, NIL, NIL, NIL, i);
    if
    :: i == P - 1 -> done[w] = 0; queue[w] = 0; epoch[w] = n
    :: else
    fi;
    i = 0;
    known = false; number = 0; kind = 0; tile = 0; column = 0; peer = 0;
    n++;
    if
    :: n <= N -> goto launch
    :: else
    fi
  }
}

#ifndef TRACE
/* Every launch forward or backward. Rows of every source and expert: any number up to MOST. With RELATED, for fewer states: in the
   first launch an expert has a row of no rank, its own, the next one, or all; in later ones each source and expert has as many as
   in the first, the opposite, 0, or 1. */
inline choose() {
  for (l : 1 .. N) {
    if
    :: GIVES(l) -> backward[l] = backward[l - 1]
    :: !GIVES(l) -> backward[l] = false
    :: !GIVES(l) -> backward[l] = true
    fi;
#ifdef RELATED
    if
    :: l > 1 -> relation = 0
    :: l > 1 -> relation = 1
    :: l > 1 -> relation = 2
    :: l > 1 -> relation = 3
    :: l == 1
    fi;
#endif
#if X > 1
    if
    :: GIVES(l) -> shared[l] = shared[l - 1]
    :: !GIVES(l) -> shared[l] = false
    :: !GIVES(l) -> shared[l] = true
    fi;
#endif
#ifdef APART
    if
    :: GIVES(l) ->
      d_step {
        for (r : 0 .. W - 1) {
          tiles[l * W + r] = tiles[(l - 1) * W + r];
          for (tile : 0 .. TILES - 1) {
            sources[(l * W + r) * TILES + tile] = sources[((l - 1) * W + r) * TILES + tile];
            EXPERT(l, r, tile) = EXPERT(l - 1, r, tile)
          }
        }
        r = 0; tile = 0
      };
      goto chosen
    :: else
    fi;
#endif
    for (r : 0 .. W - 1) {
      tile = 0;
      for (x : 0 .. X - 1) {
        all = 0;
#ifdef RELATED
        do
        :: pick < 3 -> pick++
        :: break
        od;
#endif
        for (s : 0 .. W - 1) {
          count = 0;
#ifdef RELATED
          if
          :: l > 1 ->
            count = (was >> ((r * X + x) * W + s)) & 1;
            count = (relation < 2 -> (relation -> 1 - count : count) : relation - 2)
          :: else ->
            count = (pick == 1 && s == r) || (pick == 2 && s == (r + 1) % W) || pick == 3;
            was = was | (count << ((r * X + x) * W + s))
          fi;
#else
          do
          :: count < MOST -> count++
          :: break
          od;
#endif
          all = all + count;
          d_step { for (k : 1 .. count) { set_source() } }
        }
        tile = tile + (all + BM - 1) / BM; pick = 0
      }
      tiles[l * W + r] = tile
    }
chosen:
    skip
  }
  relation = 0; was = 0; l = 0; r = 0; x = 0; s = 0; tile = 0; all = 0; count = 0
}

inline set_source() {
  first = tile + (all - k) / BM;
  sources[(l * W + r) * TILES + first] = sources[(l * W + r) * TILES + first] | (1 << s);
  EXPERT(l, r, first) = x
}
#endif

init {
  byte l, r, x, s, tile, all, count, relation, pick;
  int was;
  atomic {
    choose();
    for (r : 0 .. W * P - 1) { run program(r / P, r % P) }
    r = 0
  }
  _nr_pr == 1;                          /* all programs have ended */
  d_step {
    for (r : 0 .. W - 1) { assert(epoch[r] == N && queue[r] == 0 && done[r] == 0 && planned[r] == N) }
  }
#ifdef TRACE
  accepted = true;
  assert(!accepted)                     /* how SPIN tells that there is a run with these events */
#endif
}
