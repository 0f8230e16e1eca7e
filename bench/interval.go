package bench

import (
	"math"
	"slices"
)

// confidence is what every interval in a report is given for.
const confidence = 0.95

// minRounds is the smallest number of rounds for which an interval of 95 %
// exists: with five, smallest and largest enclose the median in only 93.75 %.
const minRounds = 6

// Median is the middle of the samples, or the mean of the two in the middle; 0
// for none. The samples are left in their order.
func Median(samples []float64) float64 {
	if len(samples) == 0 {
		return 0
	}
	sorted := slices.Sorted(slices.Values(samples))
	half := len(sorted) / 2
	if len(sorted)%2 == 1 {
		return sorted[half]
	}
	return (sorted[half-1] + sorted[half]) / 2
}

// MedianInterval is the 95 % confidence interval of the median that the samples
// were drawn around, whatever their distribution. With the samples in order it
// is [x(k), x(n+1-k)] for the largest k with
//
//	1 - 2 * sum(i=0..k-1) C(n,i) / 2^n  >=  0.95
//
// because the number of samples below the true median is binomial(n, 1/2)
// (W. J. Conover, Practical Nonparametric Statistics, 3rd ed., section 3.2;
// H. A. David and H. N. Nagaraja, Order Statistics, 3rd ed., section 7.1).
// ok is false with fewer than 6 samples, for which no such interval exists.
func MedianInterval(samples []float64) (low, high float64, ok bool) {
	n := len(samples)
	k := intervalRank(n)
	if k == 0 {
		return 0, 0, false
	}
	sorted := slices.Sorted(slices.Values(samples))
	return sorted[k-1], sorted[n-k], true
}

// intervalRank is the k of MedianInterval, 0 where there is none. Terms are
// taken as logarithms, for C(n,i) leaves float64 near n = 1030.
func intervalRank(n int) int {
	outside := 0.0
	for k := 0; k < n/2; k++ {
		outside += 2 * math.Exp(logChoose(n, k)-float64(n)*math.Ln2)
		if outside > 1-confidence {
			return k
		}
	}
	return n / 2
}

func logChoose(n, k int) float64 {
	all, _ := math.Lgamma(float64(n + 1))
	in, _ := math.Lgamma(float64(k + 1))
	out, _ := math.Lgamma(float64(n - k + 1))
	return all - in - out
}
