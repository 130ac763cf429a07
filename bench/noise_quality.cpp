// The program behind noise_quality.py:
//     exact               JSON: every radius word, every angle word and exp, against float64
//     sample ORDER LOG2   JSON: histogram and errors of 2^LOG2 normals
//     normals COUNT       that many float32 normals, raw
//     words ORDER BITS    random words without end, raw; BITS: forward | reversed
//     smallcrush ORDER BITS, crush ORDER BITS    TestU01's report, where it was linked
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <iterator>
#include <vector>

#include "math/normal.h"
#include "math/philox.h"

#if defined(TESTU01)
extern "C" {
#include <bbattery.h>
#include <unif01.h>
}
#endif

using namespace fastgen::baseline;

namespace {

constexpr double kWords = 0x1p32;
constexpr int kMoments = 8;

double ulp(double truth) {
    uint64_t bits;
    memcpy(&bits, &truth, sizeof bits);
    bits &= 0x7FF0000000000000u;
    memcpy(&truth, &bits, sizeof bits);
    return truth * 0x1p-23;
}

double error_in_ulp(float value, double truth) {
    return truth == 0.0 ? (value == 0.0f ? 0.0 : INFINITY) : fabs((value - truth) / ulp(truth));
}

struct Worst {
    double error = 0.0;
    float at = 0.0f;
    std::vector<double> curve;

    explicit Worst(size_t bins) : curve(bins) {}
    void add(float value, double truth, float x, size_t bin) {
        const double now = error_in_ulp(value, truth);
        if (now > curve[bin]) curve[bin] = now;
        if (now > error) error = now, at = x;
    }
    void print(const char* name) const {
        printf("\"%s\": {\"ulp\": %.6f, \"at\": \"%a\", \"curve\": [", name, error, at);
        for (size_t i = 0; i < curve.size(); ++i) printf("%s%.4g", i ? "," : "", curve[i]);
        printf("]},\n");
    }
};

struct Moments {
    long double sum[kMoments + 1] = {};

    void add(double value, double count) {
        long double power = count;
        for (int k = 0; k <= kMoments; ++k, power *= value) sum[k] += power;
    }
    void print(const char* name) const {
        printf("\"%s\": [", name);
        for (int k = 0; k <= kMoments; ++k)
            printf("%s%.18Lg", k ? ", " : "", sum[k] / (long double)kWords);
        printf("],\n");
    }
};

// Visits every value of u once, in rising order, with how many of all 2^32 words give it.
template <class Visit>
void each_uniform(Visit visit) {
    float u = uniform_open_closed(0);
    uint64_t count = 0;
    for (uint64_t word = 0; word < uint64_t{1} << 32; ++word, ++count) {
        const float next = uniform_open_closed(uint32_t(word));
        if (next == u) continue;
        if (!(next > u)) abort();
        visit(u, double(count));
        u = next;
        count = 0;
    }
    visit(u, double(count));
}

// cos and sin of 2 pi u: the quarter turns are taken off exactly, before pi comes in.
void true_cos_sin(float u, double& cosine, double& sine) {
    const double quarters = rint(4.0 * u), f = (4.0 * u - quarters) * M_PI_2;
    const double c = cos(f), s = sin(f);
    const int quadrant = int(quarters) & 3;
    cosine = quadrant == 0 ? c : quadrant == 1 ? -s : quadrant == 2 ? -c : s;
    sine = quadrant == 0 ? s : quadrant == 1 ? c : quadrant == 2 ? -s : -c;
}

size_t eighth_of_binade(float u) { return (float_bits(u) >> 20) - (float_bits(0x1p-33f) >> 20); }

void sweep_radius() {
    // Float32 radii lie in {0} and [2^-12, 7): one counter for each.
    const uint32_t base = float_bits(0x1p-12f);
    std::vector<uint32_t> of_radius(float_bits(7.0f) - base);
    const double tails[] = {0.5, 1, 2, 3, 4, 5, 5.5, 6, 6.25, 6.5, 6.7};
    double above[std::size(tails)] = {};
    Worst log_error(265), radius_error(265);
    Moments moments;
    uint64_t distinct = 0;
    double zero = 0.0;
    float least = 1.0f, most = 0.0f;
    each_uniform([&](float u, double count) {
        const float log_u = log_positive(u), radius = sqrtf(-2.0f * log_u);
        const double truth = log(double(u));
        log_error.add(log_u, truth, u, eighth_of_binade(u));
        radius_error.add(radius, sqrt(-2.0 * truth), u, eighth_of_binade(u));
        moments.add(radius, count);
        least = std::min(least, u);
        most = std::max(most, u);
        ++distinct;
        if (radius == 0.0f)
            zero += count;
        else
            of_radius.at(float_bits(radius) - base) += uint32_t(count);
        for (size_t i = 0; i < std::size(tails) && radius > tails[i]; ++i)
            above[i] += count * acos(tails[i] / radius) * M_1_PI;  // P(cos > t / r)
    });
    double distance = 0.0, beyond = 0.0;  // beyond: P(R > r)
    uint64_t distinct_radii = zero > 0.0;
    for (size_t i = of_radius.size(); i-- > 0;) {
        if (of_radius[i] == 0) continue;
        const double r = bits_float(base + uint32_t(i)), truth = exp(-0.5 * r * r);
        const double after = beyond + of_radius[i] / kWords;
        distance = std::max({distance, fabs(beyond - truth), fabs(after - truth)});
        beyond = after;
        ++distinct_radii;
    }
    distance = std::max(distance, fabs(beyond - 1.0));
    printf("\"distinct_u\": %llu, \"least_u\": \"%a\", \"greatest_u\": \"%a\",\n",
           (unsigned long long)distinct, least, most);
    printf("\"distinct_radii\": %llu, \"words_of_radius_zero\": %.0f, \"greatest_radius\": %.9g,\n",
           (unsigned long long)distinct_radii, zero,
           sqrtf(-2.0f * log_positive(uniform_open_closed(0))));
    printf("\"radius_ks\": %.9g,\n\"tails\": [", distance);
    for (size_t i = 0; i < std::size(tails); ++i)
        printf("%s[%g, %.12g]", i ? ", " : "", tails[i], above[i] / kWords);
    printf("],\n");
    log_error.print("log");
    radius_error.print("radius");
    moments.print("radius_moments");
}

void sweep_angle() {
    Worst cosine_error(256), sine_error(256);
    Moments cosine_moments, sine_moments;
    long double product = 0, squares = 0;
    double distance = 0.0, before = 0.0, norm = 0.0;
    each_uniform([&](float u, double count) {
        float cosine, sine;
        double true_cosine, true_sine;
        cos_sin_turn(u, cosine, sine);
        true_cos_sin(u, true_cosine, true_sine);
        const size_t bin = std::min(size_t(u * 256), size_t{255});
        cosine_error.add(cosine, true_cosine, u, bin);
        sine_error.add(sine, true_sine, u, bin);
        cosine_moments.add(cosine, count);
        sine_moments.add(sine, count);
        const double both = double(cosine) * sine;
        product += (long double)both * count;
        squares += (long double)(both * both) * count;
        norm = std::max(norm, fabs(hypot(double(cosine), double(sine)) - 1.0));
        const double after = before + count;
        distance = std::max({distance, fabs(before / kWords - u), fabs(after / kWords - u)});
        before = after;
    });
    printf("\"angle_ks\": %.9g, \"norm_error\": %.6g,\n", distance, norm);
    printf("\"cos_sin\": %.12Lg, \"cos2_sin2\": %.18Lg,\n", product / kWords, squares / kWords);
    cosine_error.print("cos");
    sine_error.print("sin");
    cosine_moments.print("cos_moments");
    sine_moments.print("sin_moments");
}

// Every x whose exponential is a normal float32 and not within half an ulp of 1.
void sweep_exp() {
    Worst error(177);  // by floor(x) from -88
    for (const uint32_t sign : {0u, 0x80000000u})
        for (uint32_t bits = float_bits(0x1p-26f); bits < float_bits(89.0f); ++bits) {
            const float x = bits_float(bits | sign);
            const double truth = exp(double(x));
            if (truth < 0x1p-126 || truth >= 0x1p128) break;
            error.add(exp_any(x), truth, x, size_t(floor(x) + 88.0f));
        }
    error.print("exp");
}

// The contract's counters, (block, step << 8 | stream, id low, id high), in one of several orders.
// 256 samples, steps, streams or seeds take a block each in turn, as the samples of a batch do.
class Blocks {
   public:
    static constexpr int kWordsAtOnce = 64;

    explicit Blocks(const char* order)
        : samples(!strcmp(order, "samples")),
          steps(!strcmp(order, "steps")),
          streams(!strcmp(order, "streams")),
          seeds(!strcmp(order, "seeds")),
          fresh(!strcmp(order, "fresh seeds")),
          plain(!strcmp(order, "blocks")) {
        if (!(samples || steps || streams || seeds || fresh || plain)) exit(2);
    }

    void next(uint32_t words[kWordsAtOnce]) {
        for (int j = 0; j < kWordsAtOnce / 4; ++j, ++i) {
            const uint32_t lane = i % 256, turn = uint32_t(i / 256);
            uint32_t* w = words + 4 * j;
            w[0] = plain ? uint32_t(i) : fresh ? 0 : turn;
            w[1] = steps ? lane << 8 | 2 : streams ? lane : 1;
            w[2] = samples ? lane : plain ? uint32_t(i >> 32) : 0;
            w[3] = 0;
            const uint64_t seed = seeds ? lane : fresh ? i : 0;
            philox4x32(w, uint32_t(seed), uint32_t(seed >> 32));
        }
    }

   private:
    const bool samples, steps, streams, seeds, fresh, plain;
    uint64_t i = 0;
};

constexpr int kAtOnce = Blocks::kWordsAtOnce;

void box_muller_all(const uint32_t words[kAtOnce], float z[kAtOnce]) {
    for (int i = 0; i < kAtOnce; i += 2) box_muller(words[i], words[i + 1], z[i], z[i + 1]);
}

void sample(const char* order, int log2_count) {
    constexpr int kBins = 4096;  // of 1/256 from -8
    constexpr uint64_t kChecked = uint64_t{1} << 24;
    std::vector<uint64_t> histogram(kBins);
    const double tails[] = {3, 4, 4.5, 5, 5.5, 6};
    uint64_t beyond[std::size(tails)] = {}, done = 0;
    float most = 0.0f;
    double error = 0.0;
    Blocks blocks(order);
    uint32_t words[kAtOnce];
    float z[kAtOnce];
    for (uint64_t made = 0; made < uint64_t{1} << log2_count; made += kAtOnce) {
        blocks.next(words);
        box_muller_all(words, z);
        for (int i = 0; i < kAtOnce; ++i) {
            ++histogram[size_t((z[i] + 8.0f) * 256.0f)];
            const float size = fabsf(z[i]);
            most = std::max(most, size);
            if (size > 3.0f)
                for (size_t t = 0; t < std::size(tails) && size > tails[t]; ++t) ++beyond[t];
        }
        for (int i = 0; i < kAtOnce && done < kChecked; i += 2, done += 2) {
            double c, s;
            const double r = sqrt(-2.0 * log(double(uniform_open_closed(words[i]))));
            true_cos_sin(uniform_open_closed(words[i + 1]), c, s);
            error = std::max({error, error_in_ulp(z[i], r * c), error_in_ulp(z[i + 1], r * s)});
        }
    }
    printf("{\"greatest\": %.9g, \"checked\": %llu, \"worst_ulp\": %.6f, \"tails\": [", most,
           (unsigned long long)done, error);
    for (size_t i = 0; i < std::size(tails); ++i)
        printf("%s[%g, %llu]", i ? ", " : "", tails[i], (unsigned long long)beyond[i]);
    printf("],\n\"histogram\": [");
    for (int i = 0; i < kBins; ++i)
        printf("%s%llu", i ? "," : "", (unsigned long long)histogram[i]);
    printf("]}\n");
}

uint32_t reversed_bits(uint32_t w) {
    w = __builtin_bswap32(w);
    w = (w & 0x0F0F0F0Fu) << 4 | (w >> 4 & 0x0F0F0F0Fu);
    w = (w & 0x33333333u) << 2 | (w >> 2 & 0x33333333u);
    return (w & 0x55555555u) << 1 | (w >> 1 & 0x55555555u);
}

class Words {
   public:
    Words(const char* order, bool reverse) : blocks(order), reverse(reverse) {}

    uint32_t next() {
        if (at == kAtOnce) {
            blocks.next(words);
            at = 0;
            if (reverse)
                for (uint32_t& word : words) word = reversed_bits(word);
        }
        return words[at++];
    }

   private:
    Blocks blocks;
    const bool reverse;
    int at = kAtOnce;
    uint32_t words[kAtOnce];
};

void write_words(Words words) {
    std::vector<uint32_t> buffer(1 << 16);
    do
        for (uint32_t& word : buffer) word = words.next();
    while (fwrite(buffer.data(), 4, buffer.size(), stdout) == buffer.size());
}

void write_normals(uint64_t count) {
    Blocks blocks("blocks");
    uint32_t words[kAtOnce];
    float z[kAtOnce];
    for (uint64_t made = 0; made < count; made += kAtOnce) {
        blocks.next(words);
        box_muller_all(words, z);
        fwrite(z, 4, size_t(std::min<uint64_t>(kAtOnce, count - made)), stdout);
    }
}

#if defined(TESTU01)
void crush(bool small, Words given) {
    static Words words = given;
    unif01_Gen* generator = unif01_CreateExternGenBits(
        const_cast<char*>("words"), []() -> unsigned int { return words.next(); });
    small ? bbattery_SmallCrush(generator) : bbattery_Crush(generator);
}
#endif

}  // namespace

int main(int argc, char** argv) {
    const char* mode = argc > 1 ? argv[1] : "";
    const char* order = argc > 2 ? argv[2] : "";
    const bool reverse = argc > 3 && !strcmp(argv[3], "reversed");
    if (!strcmp(mode, "exact")) {
        printf("{");
        sweep_radius();
        sweep_angle();
        sweep_exp();
        printf("\"words\": 4294967296}\n");
    } else if (!strcmp(mode, "sample")) {
        sample(order, argc > 3 ? atoi(argv[3]) : 0);
    } else if (!strcmp(mode, "normals")) {
        write_normals(strtoull(order, nullptr, 10));
    } else if (!strcmp(mode, "words")) {
        write_words(Words(order, reverse));
#if defined(TESTU01)
    } else if (!strcmp(mode, "smallcrush") || !strcmp(mode, "crush")) {
        crush(!strcmp(mode, "smallcrush"), Words(order, reverse));
#endif
    } else {
        return 2;
    }
    return 0;
}
