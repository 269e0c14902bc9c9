// A whole step of a decoder in one parallel region: tokens in, keys and values stored, logits and drawn tokens out.
//
// `Decoder::step` is the order of things; each phase below it hands its work to the team unit by unit and ends at a barrier.
// A row's result never depends on the other rows: sums are made in one fixed order, whoever makes them.
#include <algorithm>
#include <chrono>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "activation.h"
#include "decoder.h"
#include "export.h"
#include "importance.h"
#include "matmul.h"
#include "norm.h"
#include "pool.h"
#include "quantize.h"
#include "rope.h"
#include "score.h"

namespace {

// Rows up to which every thread prepares the input of a product for itself, which saves a barrier.
constexpr int kAlone = 2;
// Score rows whose logits are made at once.
constexpr int kScoreTile = 32;

enum Phase { EMBED, NORM, QKV, ROPE, ATTEND, OUTPUT, GATE_UP, DOWN, HEAD, DRAW, PHASES };

template <class T>
class Buffer {
  public:
    explicit Buffer(size_t count = 0)
        : data_(static_cast<T*>(operator new[](count * sizeof(T) + 64, std::align_val_t(64)))) {}
    T* get() const { return data_.get(); }

  private:
    struct Free {
        void operator()(T* p) const { operator delete[](p, std::align_val_t(64)); }
    };
    std::unique_ptr<T[], Free> data_;
};

// Memory for the quantized input of products.
class Inputs {
  public:
    Inputs(int rows, int cols)
        : values_((size_t)rows * cols), codes_((size_t)rows * cols), scales_((size_t)rows * (cols / GROUP + 1)),
          sums_((size_t)rows * (cols / GROUP + 1)), cols_(cols) {}

    Activations view() const { return {cols_, values_.get(), codes_.get(), scales_.get(), sums_.get()}; }
    float* row(int t) const { return values_.get() + (size_t)t * cols_; }

    // Quantizes columns [begin, begin + count) of row t; whole groups. Rows of odd width stay as values.
    void quantize(int t, int begin, int count) const {
        if (cols_ % GROUP) return;
        size_t group = (size_t)t * (cols_ / GROUP) + begin / GROUP;
        quantize_row(row(t) + begin, count, codes_.get() + (size_t)t * cols_ + begin, scales_.get() + group,
                     sums_.get() + group);
    }
    void quantize(int t) const { quantize(t, 0, cols_); }

    // Quantizes one group of row t that was not stored as values: x[GROUP], columns [begin, begin + GROUP).
    void quantize(int t, int begin, const float* x) const {
        const size_t group = (size_t)t * (cols_ / GROUP) + begin / GROUP;
        quantize_row(x, GROUP, codes_.get() + (size_t)t * cols_ + begin, scales_.get() + group, sums_.get() + group);
    }

  private:
    Buffer<float> values_;
    Buffer<int8_t> codes_;
    Buffer<float> scales_, sums_;
    int cols_;
};

// Query rows of a span that attention takes together.
struct Tile {
    int span, first, rows;
    int segments;     // of its context
    size_t partials;  // where its partial results begin
};

struct TileSegment {
    int tile, segment;
};

Span view(const StepSpan& span) { return {span.row, span.count, span.start, span.sinks, span.table}; }

// Two pieces a thread: long enough that memory is read far ahead, short enough that a thread which lost its core for a while
// leaves something to the others. Eight pieces cost a quarter of a lone sequence's speed.
inline int grain_of(int units, int threads) {
    int grain = units / (threads * 2);
    return grain > 1 ? grain : 1;
}

// Adds 16 floats of a block to memory that may end within it.
inline void store16(float* to, int count, V16 v) {
    if (count >= BLOCK) {
        for (int i = 0; i < BLOCK / W; i++) store(to + i * W, v.v[i]);
    } else {
        float all[BLOCK];
        for (int i = 0; i < BLOCK / W; i++) store(all + i * W, v.v[i]);
        std::memcpy(to, all, (size_t)count * sizeof(float));
    }
}

inline V16 load16(const float* from, int count) {
    V16 v;
    if (count >= BLOCK) {
        for (int i = 0; i < BLOCK / W; i++) v.v[i] = load(from + i * W);
    } else {
        float all[BLOCK] = {};
        std::memcpy(all, from, (size_t)count * sizeof(float));
        for (int i = 0; i < BLOCK / W; i++) v.v[i] = load(all + i * W);
    }
    return v;
}

inline V16 add16(V16 a, V16 b) {
    for (int i = 0; i < BLOCK / W; i++) a.v[i] = add(a.v[i], b.v[i]);
    return a;
}

inline V activate(int32_t kind, V x) { return kind == SILU ? silu(x) : gelu_tanh(x); }

class Decoder {
  public:
    Decoder(const DecoderSpec& spec, Pool& pool);
    void run(Step& step);
    double phase_seconds[PHASES] = {};

  private:
    static void enter(void* self, Member& member) { static_cast<Decoder*>(self)->step(member); }
    void step(Member& member);
    void plan();
    void plan_segments();

    void embed(Member& member);
    const Inputs& norm(Member& member, const float* weight);
    void query_key_value(Member& member, const LayerSpec& layer, const Inputs& input);
    void rope_and_store(const LayerSpec& layer, int index, int row, int kv_head);
    void attend(Member& member, const LayerSpec& layer, int index);
    void attend_tiles(Member& member, const LayerSpec& layer, int index);
    void attend_segments(Member& member, const LayerSpec& layer, int index);
    Attention attention(const LayerSpec& layer, int index, const StepSpan& span, int kv_head) const;
    void quantize_attended(const Tile& tile, int kv_head);
    void observe(Member& member, const LayerSpec& layer, int index);
    void add_product(Member& member, const Projection& product, const Inputs& input, const float* post_norm);
    void mlp(Member& member, const LayerSpec& layer);
    void gate_up(const Mlp& mlp, const Inputs& input, int pair, const int32_t* index, int count, const int32_t* to);
    void route(Member& member, const LayerSpec& layer, const Inputs& input);
    void experts(Member& member, const LayerSpec& layer, const Inputs& input);
    void add_experts(Member& member, const LayerSpec& layer);
    bool streamed(const float* out, int count) const;
    void logits(Member& member, const int32_t* rows, int count, float* out);
    void draw(Member& member);
    void score(Member& member);
    void pool_rows(Member& member);
    void lap(Member& member, Phase phase);

    int kv_heads() const { return spec_.cache.kv_heads; }
    int head_dim() const { return spec_.cache.head_dim; }
    int query_size() const { return spec_.heads * head_dim(); }
    int kv_size() const { return kv_heads() * head_dim(); }
    int group() const { return spec_.heads / kv_heads(); }
    float* x(int t) const { return x_.get() + (size_t)t * spec_.width; }
    float* angles(const Buffer<float>& from, int rope, int row, int part) const;
    const StepSpan& span_of(int row) const { return step_->span[span_of_row_[row]]; }

    DecoderSpec spec_;
    std::vector<LayerSpec> layers_;
    std::vector<RopeSpec> ropes_;
    std::vector<size_t> rope_offset_;
    Pool& pool_;
    int experts_active_ = 0;
    Buffer<float> x_, query_, rebased_, key_, value_, extra_, angles_, angles_rebased_, routed_, score_logits_;
    Buffer<int32_t> routed_ids_;
    Inputs normed_, attended_, middle_;
    std::vector<Inputs> alone_;                       // a thread's own input, for few rows
    std::vector<Buffer<uint8_t>> scratch_;            // a thread's own, for attention, draws and compaction
    std::vector<std::vector<int32_t>> expert_pairs_;  // by expert: row * active + slot
    std::vector<std::vector<int32_t>> expert_rows_;
    std::vector<int32_t> span_of_row_;
    std::vector<Tile> tiles_;
    std::vector<TileSegment> segments_;
    std::vector<float> partials_;
    bool split_ = false;  // attention goes by segments
    bool single_rows_ = false;  // each span is one row: attention needs nothing that another unit stores
    Step* step_ = nullptr;
    std::chrono::steady_clock::time_point lap_;
};

int widest_active(const DecoderSpec& spec) {
    int active = 1;
    for (int i = 0; i < spec.layers; i++)
        if (spec.layer[i].router && spec.layer[i].active > active) active = spec.layer[i].active;
    return active;
}

size_t angle_floats(const DecoderSpec& spec) {
    size_t floats = 0;
    for (int i = 0; i < spec.ropes; i++) floats += 2 * (size_t)spec.rope[i].half;
    return floats;
}

Decoder::Decoder(const DecoderSpec& spec, Pool& pool)
    : spec_(spec), layers_(spec.layer, spec.layer + spec.layers), ropes_(spec.rope, spec.rope + spec.ropes), pool_(pool),
      experts_active_(widest_active(spec)), x_((size_t)spec.max_rows * spec.width),
      query_((size_t)spec.max_rows * spec.heads * spec.cache.head_dim),
      rebased_((size_t)spec.max_rows * spec.heads * spec.cache.head_dim),
      key_((size_t)spec.max_rows * spec.cache.kv_heads * spec.cache.head_dim),
      value_((size_t)spec.max_rows * spec.cache.kv_heads * spec.cache.head_dim),
      extra_((size_t)spec.max_rows * spec.width), angles_(spec.max_rows * angle_floats(spec)),
      angles_rebased_(spec.max_rows * angle_floats(spec)), routed_((size_t)spec.max_rows * experts_active_),
      score_logits_((size_t)kScoreTile * spec.vocab), routed_ids_((size_t)spec.max_rows * experts_active_),
      normed_(spec.max_rows, spec.width), attended_(spec.max_rows, spec.heads * spec.cache.head_dim),
      middle_(spec.max_rows * experts_active_, spec.middle), span_of_row_(spec.max_rows) {
    int experts = 1;
    for (const LayerSpec& layer : layers_) experts = layer.experts > experts ? layer.experts : experts;
    expert_pairs_.resize(experts);
    expert_rows_.resize(experts);
    size_t offset = 0;
    for (const RopeSpec& rope : ropes_) {
        rope_offset_.push_back(offset);
        offset += 2 * (size_t)rope.half;
    }
    const size_t need = std::max(attention_scratch(spec.cache, group()), sample_scratch(spec.vocab));
    for (int i = 0; i < pool.size(); i++) {
        alone_.emplace_back(kAlone, spec.width);
        scratch_.emplace_back(need);
    }
}

// The order of a step.
void Decoder::step(Member& member) {
    if (member.id() == 0) lap_ = std::chrono::steady_clock::now();
    embed(member);
    for (int i = 0; i < spec_.layers; i++) {
        const LayerSpec& layer = layers_[i];
        query_key_value(member, layer, norm(member, layer.attention_norm));
        attend(member, layer, i);
        add_product(member, layer.output, attended_, layer.attention_post_norm);
        mlp(member, layer);
    }
    if (step_->outputs) {
        logits(member, step_->output_rows, step_->outputs, step_->logits);
        draw(member);
    }
    score(member);
    pool_rows(member);
}

void Decoder::run(Step& step) {
    step_ = &step;
    plan();
    pool_.run(enter, this);
}

// Which rows belong to whom, and which rows attention takes together.
void Decoder::plan() {
    tiles_.clear();
    single_rows_ = true;
    for (int s = 0; s < step_->spans; s++) {
        const StepSpan& span = step_->span[s];
        for (int i = 0; i < span.count; i++) span_of_row_[span.row + i] = s;
        for (int first = 0; first < span.count; first += TILE_ROWS) {
            int rows = span.count - first < TILE_ROWS ? span.count - first : TILE_ROWS;
            tiles_.push_back({s, first, rows, attention_segments(view(span), first, rows), 0});
        }
        single_rows_ = single_rows_ && span.count == 1;
    }
    split_ = false;
    if ((int)tiles_.size() * kv_heads() < 4 * pool_.size()) plan_segments();
}

void Decoder::plan_segments() {
    segments_.clear();
    size_t floats = 0;
    for (int i = 0; i < (int)tiles_.size(); i++) {
        Tile& tile = tiles_[i];
        tile.partials = floats;
        floats += (size_t)kv_heads() * tile.segments * tile.rows * group() * partial_floats(spec_.cache);
        for (int segment = 0; segment < tile.segments; segment++) segments_.push_back({i, segment});
    }
    split_ = segments_.size() > tiles_.size();
    if (split_ && partials_.size() < floats) partials_.resize(floats);
}

void Decoder::lap(Member& member, Phase phase) {
    if (member.id() != 0) return;
    auto now = std::chrono::steady_clock::now();
    phase_seconds[phase] += std::chrono::duration<double>(now - lap_).count();
    lap_ = now;
}

float* Decoder::angles(const Buffer<float>& from, int rope, int row, int part) const {
    size_t start = rope_offset_[rope] * spec_.max_rows + (size_t)row * 2 * ropes_[rope].half;
    return from.get() + start + (size_t)part * ropes_[rope].half;
}

void Decoder::embed(Member& member) {
    member.share(step_->rows, grain_of(step_->rows, member.size()), [&](int begin, int end) {
        for (int t = begin; t < end; t++) {
            read_row(spec_.embedding, step_->tokens[t], x(t));
            if (spec_.embedding_scale != 1.0f)
                for (int i = 0; i < spec_.width; i++) x(t)[i] *= spec_.embedding_scale;
            const StepSpan& span = span_of(t);
            for (int r = 0; r < spec_.ropes; r++) {
                const RopeSpec& rope = ropes_[r];
                auto turn = [&](const Buffer<float>& to, int64_t position) {
                    rope_angles(rope.frequencies, rope.half, (double)position, rope.factor, angles(to, r, t, 0),
                                angles(to, r, t, 1));
                };
                turn(angles_, span.position + (t - span.row));
                if (span.sinks > 0) turn(angles_rebased_, span.rebased + (t - span.row));
            }
        }
    });
    lap(member, EMBED);
}

// The normalized and quantized residual stream; for few rows each thread's own.
const Inputs& Decoder::norm(Member& member, const float* weight) {
    bool own = step_->rows <= kAlone;
    const Inputs& to = own ? alone_[member.id()] : normed_;
    auto body = [&](int begin, int end) {
        for (int t = begin; t < end; t++) {
            rms_norm_row(x(t), weight, spec_.eps, spec_.width, to.row(t));
            to.quantize(t);
        }
    };
    if (own)
        body(0, step_->rows);
    else
        member.share(step_->rows, grain_of(step_->rows, member.size()), body);
    lap(member, NORM);
    return to;
}

void Decoder::query_key_value(Member& member, const LayerSpec& layer, const Inputs& input) {
    struct Part {
        const Projection& projection;
        float* out;
        int first;
    };
    int queries = blocks(layer.query.weight), keys = blocks(layer.key.weight), values = blocks(layer.value.weight);
    const Part parts[] = {
        {layer.query, query_.get(), 0}, {layer.key, key_.get(), queries}, {layer.value, value_.get(), queries + keys}};
    Activations view = input.view();
    int units = queries + keys + values;
    member.share(units, grain_of(units, member.size()), [&](int begin, int end) {
        for (const Part& part : parts) {
            const Matrix& weight = part.projection.weight;
            const int first = std::max(begin - part.first, 0), last = std::min(end - part.first, blocks(weight));
            const float* bias = part.projection.bias;
            multiply_blocks(weight, first, last, view, step_->rows, [&](int block, int t, V16 v) {
                const int at = block * BLOCK, count = weight.rows - at;
                if (bias) v = add16(v, load16(bias + at, count));
                store16(part.out + (size_t)t * weight.rows + at, count, v);
            });
        }
    });
    lap(member, QKV);
}

// Norms and turns a kv head's key and its queries of one row, and stores key and value.
void Decoder::rope_and_store(const LayerSpec& layer, int index, int row, int kv_head) {
    const int dim = head_dim(), half = ropes_[layer.rope].half;
    const float *cos = angles(angles_, layer.rope, row, 0), *sin = angles(angles_, layer.rope, row, 1);
    const StepSpan& span = span_of(row);
    for (int h = kv_head * group(); h < (kv_head + 1) * group(); h++) {
        float* query = query_.get() + (size_t)row * query_size() + h * dim;
        if (layer.query_norm) rms_norm_row(query, layer.query_norm, spec_.eps, dim, query);
        if (span.sinks > 0) {
            float* again = rebased_.get() + (size_t)row * query_size() + h * dim;
            std::memcpy(again, query, dim * sizeof(float));
            rope_head(again, angles(angles_rebased_, layer.rope, row, 0), angles(angles_rebased_, layer.rope, row, 1), half);
        }
        rope_head(query, cos, sin, half);
    }
    float* key = key_.get() + (size_t)row * kv_size() + kv_head * dim;
    if (layer.key_norm) rms_norm_row(key, layer.key_norm, spec_.eps, dim, key);
    rope_head(key, cos, sin, half);
    store_key_value(spec_.cache, index, kv_head, span.table, span.start + (row - span.row), key,
                    value_.get() + (size_t)row * kv_size() + kv_head * dim);
}

Attention Decoder::attention(const LayerSpec& layer, int index, const StepSpan& span, int kv_head) const {
    return {&spec_.cache,  index,        kv_head, group(), spec_.attention_scale, layer.window,
            query_.get(),  span.sinks > 0 ? rebased_.get() : nullptr,              query_size()};
}

// Quantizes what a kv head's queries of a tile attended to, where that is whole groups.
void Decoder::quantize_attended(const Tile& tile, int kv_head) {
    const int width = group() * head_dim(), first = step_->span[tile.span].row + tile.first;
    if (width % GROUP) return;
    for (int t = first; t < first + tile.rows; t++) attended_.quantize(t, kv_head * width, width);
}

void Decoder::attend(Member& member, const LayerSpec& layer, int index) {
    const int heads = kv_heads(), stores = step_->rows * heads;
    if (!single_rows_ || split_) {
        member.share(stores, grain_of(stores, member.size()), [&](int begin, int end) {
            for (int unit = begin; unit < end; unit++) rope_and_store(layer, index, unit / heads, unit % heads);
        });
        lap(member, ROPE);
    }
    if (split_)
        attend_segments(member, layer, index);
    else
        attend_tiles(member, layer, index);
    if (group() * head_dim() % GROUP != 0)
        member.share(step_->rows, 1, [&](int begin, int end) {
            for (int t = begin; t < end; t++) attended_.quantize(t);
        });
    observe(member, layer, index);
    lap(member, ATTEND);
}

void Decoder::attend_tiles(Member& member, const LayerSpec& layer, int index) {
    const int heads = kv_heads();
    // Long and short contexts lie side by side: one unit at a time keeps the threads busy to the end.
    member.share((int)tiles_.size() * heads, 1, [&](int begin, int end) {
        for (int unit = begin; unit < end; unit++) {
            const Tile& tile = tiles_[unit / heads];
            const StepSpan& of = step_->span[tile.span];
            if (single_rows_) rope_and_store(layer, index, of.row, unit % heads);
            attention_tile(attention(layer, index, of, unit % heads), view(of), tile.first, tile.rows, attended_.row(0),
                           query_size(), scratch_[member.id()].get());
            quantize_attended(tile, unit % heads);
        }
    });
}

// The same where there are fewer tiles than threads could share and contexts are long: by segments of the context.
void Decoder::attend_segments(Member& member, const LayerSpec& layer, int index) {
    const int heads = kv_heads();
    auto partials = [&](const Tile& tile, int kv_head, int segment) {
        size_t at = (size_t)kv_head * tile.segments + segment;
        return partials_.data() + tile.partials + at * tile.rows * group() * partial_floats(spec_.cache);
    };
    member.share((int)segments_.size() * heads, 1, [&](int begin, int end) {
        for (int unit = begin; unit < end; unit++) {
            const Tile& tile = tiles_[segments_[unit / heads].tile];
            const StepSpan& of = step_->span[tile.span];
            const int segment = segments_[unit / heads].segment;
            attention_partial(attention(layer, index, of, unit % heads), view(of), tile.first, tile.rows, segment,
                              partials(tile, unit % heads, segment), scratch_[member.id()].get());
        }
    });
    member.share((int)tiles_.size() * heads, 1, [&](int begin, int end) {
        for (int unit = begin; unit < end; unit++) {
            const Tile& tile = tiles_[unit / heads];
            const StepSpan& of = step_->span[tile.span];
            attention_merge(attention(layer, index, of, unit % heads), view(of), tile.first, tile.rows,
                            partials(tile, unit % heads, 0), attended_.row(0), query_size(), scratch_[member.id()].get());
            quantize_attended(tile, unit % heads);
        }
    });
}

// Adds the attention of the rows that budgets go by to `importance`.
void Decoder::observe(Member& member, const LayerSpec& layer, int index) {
    bool any = false;
    for (int s = 0; s < step_->spans; s++) any = any || step_->span[s].observe > 0;
    if (!any) return;
    member.share(step_->spans * kv_heads(), 1, [&](int begin, int end) {
        for (int unit = begin; unit < end; unit++) {
            const StepSpan& of = step_->span[unit / kv_heads()];
            if (of.observe <= 0) continue;
            ::observe(attention(layer, index, of, unit % kv_heads()), view(of), of.observe, spec_.importance,
                      scratch_[member.id()].get());
        }
    });
}

// x += product(input), through a norm first where the architecture has one.
void Decoder::add_product(Member& member, const Projection& product, const Inputs& input, const float* post_norm) {
    const Matrix& weight = product.weight;
    Activations view = input.view();
    const int units = blocks(weight);
    member.share(units, grain_of(units, member.size()), [&](int begin, int end) {
        multiply_blocks(weight, begin, end, view, step_->rows, [&](int block, int t, V16 v) {
            const int at = block * BLOCK, count = weight.rows - at;
            if (product.bias) v = add16(v, load16(product.bias + at, count));
            float* to = (post_norm ? extra_.get() + (size_t)t * spec_.width : x(t)) + at;
            store16(to, count, post_norm ? v : add16(load16(to, count), v));
        });
    });
    if (post_norm)
        member.share(step_->rows, grain_of(step_->rows, member.size()), [&](int begin, int end) {
            for (int t = begin; t < end; t++) {
                float* from = extra_.get() + (size_t)t * spec_.width;
                rms_norm_row(from, post_norm, spec_.eps, spec_.width, from);
                for (int i = 0; i < spec_.width; i++) x(t)[i] += from[i];
            }
        });
    lap(member, &input == &attended_ ? OUTPUT : DOWN);
}

void Decoder::mlp(Member& member, const LayerSpec& layer) {
    const Inputs& input = norm(member, layer.mlp_norm);
    if (layer.router) {
        route(member, layer, input);
        experts(member, layer, input);
        add_experts(member, layer);
        return;
    }
    const int pairs = (blocks(layer.mlps[0].gate.weight) + 1) / 2;
    member.share(pairs, grain_of(pairs, member.size()), [&](int begin, int end) {
        for (int pair = begin; pair < end; pair++) gate_up(layer.mlps[0], input, pair, nullptr, step_->rows, nullptr);
    });
    lap(member, GATE_UP);
    add_product(member, layer.mlps[0].down, middle_, layer.mlp_post_norm);
}

// Two blocks, so one group, of activation(gate) * up for the rows `index` (null: all), to the rows `to` of `middle_` (null:
// the same): as codes, or as values where the weights that read them are not quantized.
void Decoder::gate_up(const Mlp& mlp, const Inputs& input, int pair, const int32_t* index, int count, const int32_t* to) {
    Activations view = input.view();
    const int at = 2 * pair * BLOCK, columns = std::min(mlp.gate.weight.rows - at, GROUP);
    const bool codes = quantized(mlp.down.weight.format);
    each_tile_of(index, count, [&](int first, int width, const int32_t* tokens) {
        alignas(64) float opened[MAX_TILE][GROUP];
        V16 gate[MAX_TILE], up[MAX_TILE];
        for (int column = 0; column < columns; column += BLOCK) {
            const int block = (at + column) / BLOCK;
            multiply_tile(mlp.gate.weight, block, view, tokens, width, gate);
            multiply_tile(mlp.up.weight, block, view, tokens, width, up);
            for (int i = 0; i < width; i++) {
                if (mlp.gate.bias) gate[i] = add16(gate[i], load16(mlp.gate.bias + at + column, columns - column));
                if (mlp.up.bias) up[i] = add16(up[i], load16(mlp.up.bias + at + column, columns - column));
                for (int j = 0; j < BLOCK / W; j++)
                    store(opened[i] + column + j * W, mul(activate(spec_.activation, gate[i].v[j]), up[i].v[j]));
            }
        }
        for (int i = 0; i < width; i++) {
            const int row = to ? to[first + i] : first + i;
            if (codes)
                middle_.quantize(row, at, opened[i]);
            else
                std::memcpy(middle_.row(row) + at, opened[i], (size_t)columns * sizeof(float));
        }
    });
}

// The `active` experts of each row and their shares (softmax over the chosen), and each expert's rows.
void Decoder::route(Member& member, const LayerSpec& layer, const Inputs& input) {
    auto body = [&](int begin, int end) {
        float all[256];
        for (int t = begin; t < end; t++) {
            for (int e = 0; e < layer.experts; e++) {
                V total = zero();
                const float *weight = layer.router + (size_t)e * spec_.width, *from = input.row(t);
                int i = 0;
                for (; i + W <= spec_.width; i += W) total = fma(load(weight + i), load(from + i), total);
                float rest = sum(total);
                for (; i < spec_.width; i++) rest += weight[i] * from[i];
                all[e] = rest;
            }
            float top = 0, shares = 0;
            for (int slot = 0; slot < layer.active; slot++) {
                int best = argmax_row(all, layer.experts);
                if (slot == 0) top = all[best];
                float share = std::exp(all[best] - top);
                routed_ids_.get()[t * layer.active + slot] = best;
                routed_.get()[t * layer.active + slot] = share;
                shares += share;
                all[best] = -INFINITY;
            }
            for (int slot = 0; slot < layer.active; slot++) routed_.get()[t * layer.active + slot] /= shares;
        }
    };
    member.barrier();  // with few rows `norm` has none, and the lists below are still read by the layer before
    if (member.id() == 0) {
        body(0, step_->rows);
        for (int e = 0; e < layer.experts; e++) {
            expert_pairs_[e].clear();
            expert_rows_[e].clear();
        }
        for (int pair = 0; pair < step_->rows * layer.active; pair++) {
            expert_pairs_[routed_ids_.get()[pair]].push_back(pair);
            expert_rows_[routed_ids_.get()[pair]].push_back(pair / layer.active);
        }
    }
    member.barrier();
}

void Decoder::experts(Member& member, const LayerSpec& layer, const Inputs& input) {
    const int pairs = (blocks(layer.mlps[0].gate.weight) + 1) / 2, units = layer.experts * pairs;
    member.share(units, grain_of(units, member.size()), [&](int begin, int end) {
        for (int unit = begin; unit < end; unit++) {
            const int e = unit / pairs, count = (int)expert_rows_[e].size();
            if (count) gate_up(layer.mlps[e], input, unit % pairs, expert_rows_[e].data(), count, expert_pairs_[e].data());
        }
    });
    lap(member, GATE_UP);
}

// x += the sum over a row's experts, in the order of their numbers, of share * down(middle).
void Decoder::add_experts(Member& member, const LayerSpec& layer) {
    Activations view = middle_.view();
    const int units = blocks(layer.mlps[0].down.weight);
    member.share(units, grain_of(units, member.size()), [&](int begin, int end) {
        for (int block = begin; block < end; block++)
            for (int e = 0; e < layer.experts; e++) {
                const std::vector<int32_t>&pairs = expert_pairs_[e], &rows = expert_rows_[e];
                if (pairs.empty()) continue;
                const Projection& down = layer.mlps[e].down;
                const int count = down.weight.rows - block * BLOCK, all = (int)pairs.size();
                multiply_blocks(down.weight, block, block + 1, view, pairs.data(), all, [&](int, int i, V16 v) {
                    if (down.bias) v = add16(v, load16(down.bias + block * BLOCK, count));
                    float* to = x(rows[i]) + block * BLOCK;
                    V16 sum = load16(to, count);
                    V share = set1(routed_.get()[pairs[i]]);
                    for (int j = 0; j < BLOCK / W; j++) sum.v[j] = fma(share, v.v[j], sum.v[j]);
                    store16(to, count, sum);
                });
            }
    });
    lap(member, DOWN);
}

// Whether logits go past the caches: many rows' would push the weights out, and be read from memory line by line first.
bool Decoder::streamed(const float* out, int count) const {
    return count > kAlone && spec_.vocab % BLOCK == 0 && (uintptr_t)out % 64 == 0;
}

// The head over some rows: (count, vocab).
void Decoder::logits(Member& member, const int32_t* rows, int count, float* out) {
    bool own = count <= kAlone;
    const Inputs& to = own ? alone_[member.id()] : normed_;
    auto body = [&](int begin, int end) {
        for (int i = begin; i < end; i++) {
            rms_norm_row(x(rows[i]), spec_.norm, spec_.eps, spec_.width, to.row(i));
            to.quantize(i);
        }
    };
    if (own)
        body(0, count);
    else
        member.share(count, grain_of(count, member.size()), body);
    Activations view = to.view();
    const int units = blocks(spec_.head);
    const bool past = streamed(out, count);
    member.share(units, grain_of(units, member.size()), [&](int begin, int end) {
        multiply_blocks(spec_.head, begin, end, view, count, [&](int block, int t, V16 v) {
            float* to = out + (size_t)t * spec_.vocab + block * BLOCK;
            if (past)
                for (int i = 0; i < BLOCK / W; i++) stream(to + i * W, v.v[i]);
            else
                store16(to, spec_.vocab - block * BLOCK, v);
        });
        if (past) fence();
    });
    lap(member, HEAD);
}

void Decoder::draw(Member& member) {
    if (!step_->draw) return;
    member.share(step_->outputs, 1, [&](int begin, int end) {
        for (int i = begin; i < end; i++) {
            float* row = step_->logits + (size_t)i * spec_.vocab;
            step_->drawn[i] = sample_row(row, spec_.vocab, step_->draw[i], scratch_[member.id()].get());
        }
    });
    lap(member, DRAW);
}

void Decoder::score(Member& member) {
    for (int first = 0; first < step_->scores; first += kScoreTile) {
        int rows[kScoreTile], count = step_->scores - first < kScoreTile ? step_->scores - first : kScoreTile;
        for (int i = 0; i < count; i++) rows[i] = step_->score[first + i].row;
        logits(member, rows, count, score_logits_.get());
        member.share(count, 1, [&](int begin, int end) {
            for (int i = begin; i < end; i++) {
                ScoreRow& of = step_->score[first + i];
                TokenScore told = score_row(score_logits_.get() + (size_t)i * spec_.vocab, spec_.vocab, of.target);
                of.logprob = told.logprob;
                of.entropy = told.entropy;
            }
        });
    }
}

void Decoder::pool_rows(Member& member) {
    if (!step_->pools) return;
    member.share(step_->pools, 1, [&](int begin, int end) {
        float* row = alone_[member.id()].row(0);
        for (int p = begin; p < end; p++) {
            const PoolRows& of = step_->pool[p];
            for (int i = 0; i < spec_.width; i++) of.sum[i] = 0;
            for (int t = of.row; t < of.row + of.count; t++) {
                rms_norm_row(x(t), spec_.norm, spec_.eps, spec_.width, row);
                for (int i = 0; i < spec_.width; i++) of.sum[i] += row[i];
            }
        }
    });
}

}  // namespace

// Null where memory is short.
EXPORT void* meshlm_decoder_new(const DecoderSpec* spec, Pool* pool) {
    try {
        return new Decoder(*spec, *pool);
    } catch (const std::bad_alloc&) {
        return nullptr;
    }
}

EXPORT void meshlm_decoder_free(void* decoder) { delete static_cast<Decoder*>(decoder); }

// 0, or 1 where memory is short (nothing of the step took effect that the next one would not overwrite).
EXPORT int meshlm_decoder_step(void* decoder, Step* step) {
    try {
        static_cast<Decoder*>(decoder)->run(*step);
        return 0;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}

// Seconds spent by phase so far: embed, norm, qkv, rope, attend, output, gate_up, down, head, draw.
EXPORT void meshlm_decoder_phases(void* decoder, double* seconds) {
    std::memcpy(seconds, static_cast<Decoder*>(decoder)->phase_seconds, sizeof(double) * PHASES);
}
