package bench

import (
	"cmp"
	"fmt"
	"maps"
	"math"
	"slices"
	"strings"
)

// plot is a picture to be drawn: lines over the number of Services, both axes
// logarithmic.
type plot struct {
	title, caption string
	lines          []line
	// reference is written where the value is 1; empty where that means nothing.
	reference string
	// format writes a value of the vertical axis.
	format func(float64) string
}

// line is one variant, in one of its positions or kinds.
type line struct {
	name, variant string
	// dash is SVG's stroke-dasharray, empty for a line without gaps.
	dash   string
	points []point
}

// point is a value and, where high is not 0, the interval it is given with.
type point struct {
	services         int
	value, low, high float64
	text             string
}

// The size of a picture and the place of its axes in it, in SVG's units.
const (
	pictureWidth, pictureHeight       = 580.0, 350.0
	axesLeft, axesTop                 = 72.0, 14.0
	axesRight, axesBottom             = 424.0, 306.0
	labelHeight, labelGap, labelWidth = 14.0, 9.0, 6.3
)

// picture is a drawn plot, as page.html takes it.
type picture struct {
	Title, Caption string
	Width, Height  float64
	Left, Top      float64
	Right, Bottom  float64
	XTicks, YTicks []tick
	Reference      *tick
	Lines          []drawn
	// TickEnd and LabelBelow are below the horizontal axis, NameLeft its middle.
	TickEnd, LabelBelow, NameLeft float64
}

type tick struct {
	At   float64
	Text string
}

type drawn struct {
	Class, Dash, Path, Shape string
	Marks                    []mark
	Label                    label
	last                     int // the number of Services of its last point
}

// mark is a point; Low and High are the ends of its whisker.
type mark struct {
	X, Y, Low, High float64
	Whisker         bool
	Text            string
}

type label struct {
	X, Y float64
	Text string
	// Leader leads from the last point to the label, where that is not beside it.
	Leader string
}

// draw lays a plot out.
func (p plot) draw() picture {
	x, y := p.scales()
	drawing := picture{
		Title: p.title, Caption: p.caption, Width: pictureWidth, Height: pictureHeight,
		Left: axesLeft, Top: axesTop, Right: axesRight, Bottom: axesBottom,
		XTicks: p.services(x), TickEnd: axesBottom + 5, LabelBelow: axesBottom + 18, NameLeft: (axesLeft + axesRight) / 2,
	}
	for _, value := range y.ticks() {
		if p.reference == "" || value != 1 {
			drawing.YTicks = append(drawing.YTicks, tick{y.place(value), p.format(value)})
		}
	}
	if p.reference != "" {
		drawing.Reference = &tick{y.place(1), p.reference}
	}
	for i, line := range p.lines {
		aside := 2.5 * (float64(i) - float64(len(p.lines)-1)/2)
		drawing.Lines = append(drawing.Lines, line.draw(x, y, aside))
	}
	placeLabels(&drawing)
	return drawing
}

// draw lays one line out, moved aside so that whiskers do not cover each other.
func (l line) draw(x, y scale, aside float64) drawn {
	d := drawn{Class: classOf(l.variant), Shape: shapeOf(l.variant), Dash: l.dash, Label: label{Text: l.name}}
	var path strings.Builder
	for i, point := range l.points {
		m := mark{X: x.place(float64(point.services)) + aside, Y: y.place(point.value)}
		m.Text = fmt.Sprintf("%s, %s Services: %s", l.name, thousands(point.services), point.text)
		if point.high > 0 {
			m.Whisker, m.Low, m.High = true, y.place(point.low), y.place(point.high)
		}
		d.Marks = append(d.Marks, m)
		fmt.Fprintf(&path, "%c%.1f %.1f", "ML"[min(i, 1)], m.X, m.Y)
	}
	d.Path, d.last = path.String(), l.points[len(l.points)-1].services
	return d
}

// scale takes values to places on paper, by their logarithms.
type scale struct{ from, to, low, high float64 }

func (s scale) place(value float64) float64 {
	share := (math.Log(value) - math.Log(s.low)) / (math.Log(s.high) - math.Log(s.low))
	return s.from + share*(s.to-s.from)
}

// scales are made so that everything that is drawn has its place, and the fewest
// Services and the most stand a little inside.
func (p plot) scales() (x, y scale) {
	x = scale{axesLeft, axesRight, math.Inf(1), 0}
	y = scale{axesBottom, axesTop, math.Inf(1), 0}
	include := func(s *scale, value float64) { s.low, s.high = min(s.low, value), max(s.high, value) }
	if p.reference != "" {
		include(&y, 1)
	}
	for _, line := range p.lines {
		for _, point := range line.points {
			include(&x, float64(point.services))
			include(&y, point.value)
			if point.high > 0 {
				include(&y, point.low)
				include(&y, point.high)
			}
		}
	}
	widen := func(s *scale, least, share float64) {
		if s.high < s.low*least {
			middle := math.Sqrt(s.low * s.high)
			s.low, s.high = middle/math.Sqrt(least), middle*math.Sqrt(least)
		}
		edge := math.Pow(s.high/s.low, share)
		s.low, s.high = s.low/edge, s.high*edge
	}
	widen(&x, 10, 0.06)
	widen(&y, 1.15, 0.06) // a few thousandths shall not look like a mountain
	return x, y
}

// ticks are round values: where the axis is short steps of equal length, else 1,
// or 1 and 3, or 1, 2 and 5 of each power of ten.
func (s scale) ticks() (values []float64) {
	if s.high < 6*s.low {
		step := niceStep((s.high - s.low) / 6)
		for i := math.Ceil(s.low / step); i*step <= s.high; i++ {
			values = append(values, math.Round(i*step*1e9)/1e9)
		}
		return values
	}
	decades := math.Log10(s.high / s.low)
	heads := []float64{1, 2, 5}
	if decades > 5 {
		heads = []float64{1}
	} else if decades > 2.5 {
		heads = []float64{1, 3}
	}
	for decade := math.Floor(math.Log10(s.low)); decade <= math.Log10(s.high); decade++ {
		for _, head := range heads {
			if value := head * math.Pow(10, decade); value >= s.low && value <= s.high {
				values = append(values, value)
			}
		}
	}
	return values
}

// niceStep is the smallest of 1, 2 and 5 times a power of ten that is not below.
func niceStep(least float64) float64 {
	power := math.Pow(10, math.Floor(math.Log10(least)))
	for _, head := range []float64{1, 2, 5} {
		if head*power >= least {
			return head * power
		}
	}
	return 10 * power
}

// services are the ticks of the horizontal axis: the numbers that were measured,
// as far as there is room for their text.
func (p plot) services(x scale) (ticks []tick) {
	var counts []int
	for _, line := range p.lines {
		for _, point := range line.points {
			counts = append(counts, point.services)
		}
	}
	slices.Sort(counts)
	end := math.Inf(-1)
	for _, count := range slices.Compact(counts) {
		text := thousands(count)
		half := labelWidth * float64(len(text)) / 2
		if at := x.place(float64(count)); at-half > end+4 {
			ticks = append(ticks, tick{at, text})
			end = at + half
		}
	}
	return ticks
}

// placeLabels puts the name of each line beside its last point. Names of lines
// that end at one number of Services stand in a column, in the order of the
// points, moved up or down to where they cover least of other lines and names.
func placeLabels(drawing *picture) {
	columns := map[int][]int{}
	for i, l := range drawing.Lines {
		columns[l.last] = append(columns[l.last], i)
	}
	var taken []box
	for _, services := range slices.Backward(slices.Sorted(maps.Keys(columns))) {
		taken = append(taken, placeColumn(drawing.Lines, columns[services], taken)...)
	}
}

// row is how finely labels are moved.
const row = 2.0

// placeColumn places the names of some lines: of all ways to put them in rows in
// their order, none less than labelHeight below another, that of the lowest cost.
func placeColumn(lines []drawn, column []int, taken []box) (placed []box) {
	end := func(i int) mark { return lines[i].Marks[len(lines[i].Marks)-1] }
	slices.SortStableFunc(column, func(a, b int) int { return cmp.Compare(end(a).Y, end(b).Y) })
	left := 0.0
	for _, i := range column {
		left = max(left, end(i).X+labelGap)
	}
	rows, apart := int(math.Floor((axesBottom-labelHeight/2)/row)), int(labelHeight/row)
	// best[k][y] is the lowest cost of the first k names, the last of them in row
	// y or above; at[k][y] is the row of that one.
	best, at := make([][]float64, len(column)+1), make([][]int, len(column)+1)
	best[0] = make([]float64, rows)
	boxOf := func(i, y int) box {
		middle := float64(y) * row
		width := labelWidth * float64(len(lines[i].Label.Text))
		return box{left, middle - labelHeight/2, left + width, middle + labelHeight/2}
	}
	for k, i := range column {
		best[k+1], at[k+1] = make([]float64, rows), make([]int, rows)
		for y := range rows {
			cost := math.Inf(1)
			if y >= (apart+1)/2+apart*k { // there is room for those above
				above := best[k][max(y-apart, 0)]
				cost = above + math.Abs(float64(y)*row-end(i).Y)/4 + boxOf(i, y).cost(lines, i, taken)
			}
			best[k+1][y], at[k+1][y] = cost, y
			if y > 0 && best[k+1][y-1] <= cost {
				best[k+1][y], at[k+1][y] = best[k+1][y-1], at[k+1][y-1]
			}
		}
	}
	y := rows - 1
	for k := len(column) - 1; k >= 0; k-- {
		i := column[k]
		y = at[k+1][max(y, 0)]
		placed = append(placed, boxOf(i, y))
		lines[i].Label.put(left, float64(y)*row, end(i))
		y -= apart
	}
	return placed
}

// put gives a label its place, and a line that leads there if it is not beside
// the last point.
func (l *label) put(x, y float64, end mark) {
	l.X, l.Y = x, y
	if math.Abs(y-end.Y) > labelHeight/2 {
		l.Leader = fmt.Sprintf("M%.1f %.1fL%.1f %.1f", end.X+3, end.Y+(y-end.Y)*0.15, x-2, y)
	}
}

// box is where a label would stand.
type box struct{ left, top, right, bottom float64 }

func (b box) cost(lines []drawn, own int, taken []box) (cost float64) {
	for _, t := range taken {
		if b.left < t.right && t.left < b.right && b.top < t.bottom && t.top < b.bottom {
			cost += 1000
		}
	}
	for i, line := range lines {
		for j := range line.Marks {
			if i != own {
				cost += b.touches(line.Marks[max(j-1, 0)], line.Marks[j])
			}
		}
	}
	return cost
}

// touches is how much of the line between two points lies in the box.
func (b box) touches(from, to mark) (cost float64) {
	const steps = 60
	for i := range steps + 1 {
		share := float64(i) / steps
		x, y := from.X+share*(to.X-from.X), from.Y+share*(to.Y-from.Y)
		if x > b.left-3 && x < b.right && y > b.top && y < b.bottom {
			cost += 1.5
		}
	}
	return cost
}

// classOf is the class of a variant in page.html, which gives it its colours.
func classOf(variant string) string {
	if slices.Contains(append(DefaultVariants, NativeAgain), variant) {
		return "v-" + variant
	}
	return "v-other"
}

// shapeOf is the mark of a variant, so that colour is not all that tells them
// apart.
func shapeOf(variant string) string {
	switch variant {
	case MillracePacket:
		return "M-4.5 0L0 -5.5L4.5 0L0 5.5Z" // rhombus
	case IptablesNft:
		return "M-4 -4H4V4H-4Z" // square
	case IptablesLegacy:
		return "M0 -5L4.8 3.6H-4.8Z" // triangle
	case Nftables:
		return "M0 5L4.8 -3.6H-4.8Z" // triangle on its tip
	}
	return "M-4 0A4 4 0 1 1 4 0A4 4 0 1 1 -4 0Z" // disc
}

// thousands writes 100000 as "100,000".
func thousands(n int) string {
	text := fmt.Sprint(n)
	for i := len(text) - 3; i > 0; i -= 3 {
		text = text[:i] + "," + text[i:]
	}
	return text
}
