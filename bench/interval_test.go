package bench

import (
	"math/big"
	"slices"
	"testing"
)

// exactRank is intervalRank in whole numbers: the largest k for which
// 2 * sum(C(n,i), i<k) <= 5 % of 2^n.
func exactRank(n int) int {
	limit := new(big.Int).Lsh(big.NewInt(1), uint(n))
	outside := new(big.Int)
	rank := 0
	for k := 1; k <= n/2; k++ {
		outside.Add(outside, new(big.Int).Binomial(int64(n), int64(k-1)))
		if new(big.Int).Mul(outside, big.NewInt(40)).Cmp(limit) > 0 {
			break
		}
		rank = k
	}
	return rank
}

func TestIntervalRankIsExact(t *testing.T) {
	for n := range 400 {
		if got, want := intervalRank(n), exactRank(n); got != want {
			t.Errorf("%d rounds: the interval starts at ordered ratio %d, want %d", n, got, want)
		}
	}
	if got := intervalRank(5000); got < 2420 || got > 2440 { // 2500 - 1.96 * sqrt(5000)/2 = 2430.7
		t.Errorf("5000 rounds: the interval starts at ordered ratio %d, far from the normal approximation's 2430", got)
	}
}

// The ranks that tables of the sign test print (Conover, table A3).
func TestIntervalRankAsInTables(t *testing.T) {
	for n, want := range map[int]int{5: 0, 6: 1, 8: 1, 9: 2, 12: 3, 15: 4, 20: 6, 25: 8, 50: 18, 100: 40} {
		if got := intervalRank(n); got != want {
			t.Errorf("%d rounds: the interval starts at ordered ratio %d, want %d", n, got, want)
		}
	}
}

func TestMedianInterval(t *testing.T) {
	samples := []float64{9, 1, 8, 2, 7, 3, 6, 4, 5}
	before := slices.Clone(samples)
	low, high, ok := MedianInterval(samples)
	if low != 2 || high != 8 || !ok {
		t.Errorf("the interval of 1..9 is [%v, %v] %v, want [2, 8]", low, high, ok)
	}
	if !slices.Equal(samples, before) {
		t.Errorf("the samples were put into another order: %v", samples)
	}
	if _, _, ok := MedianInterval(samples[:minRounds-1]); ok {
		t.Errorf("%d rounds gave a 95 %% interval; their range encloses the median in 93.75 %% only", minRounds-1)
	}
	if _, _, ok := MedianInterval(samples[:minRounds]); !ok {
		t.Errorf("%d rounds gave no interval", minRounds)
	}
}

func TestMedian(t *testing.T) {
	for _, c := range []struct {
		samples []float64
		want    float64
	}{{nil, 0}, {[]float64{4}, 4}, {[]float64{3, 1}, 2}, {[]float64{5, 1, 3}, 3}, {[]float64{4, 1, 3, 2}, 2.5}} {
		if got := Median(c.samples); got != c.want {
			t.Errorf("the median of %v is %v, want %v", c.samples, got, c.want)
		}
	}
}

func TestQuantileIsNearestRank(t *testing.T) {
	hundred := make([]uint32, 100)
	for i := range hundred {
		hundred[i] = uint32(i + 1)
	}
	for _, c := range []struct {
		sorted []uint32
		q      float64
		want   uint32
	}{
		{nil, 0.5, 0}, {[]uint32{7}, 0.99, 7}, {[]uint32{1, 2}, 0.5, 1}, {[]uint32{1, 2, 3}, 0.5, 2},
		{hundred, 0.5, 50}, {hundred, 0.99, 99}, {hundred[:50], 0.99, 50},
	} {
		if got := quantile(c.sorted, c.q); got != c.want {
			t.Errorf("quantile %v of %d samples is %d, want %d", c.q, len(c.sorted), got, c.want)
		}
	}
}
